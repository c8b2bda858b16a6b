"""Publishing: from a staging folder to an artifact, by one rename at the end.

The order is what makes it safe to kill: a note of what is under way (the manifest without files),
the deletions, the digests, the flush to disk, the manifest, the rename. Each step can be repeated,
so a cut-off publication is finished by running it again from the note.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import MANIFEST, Artifact, FileEntry, Manifest
from rlhf_exp.store.atomic_files import (
    disk_full_is_user_error,
    drafts_below,
    exchange,
    files_below,
    sync,
    sync_tree,
    unallocated,
    write_json_atomic,
)
from rlhf_exp.store.sealed import file_digest_once

ATTEMPTS, PAUSE_S = 5, 0.02
Read = Callable[[Path], Artifact | None]


@dataclass(frozen=True)
class Publication:
    """A publication: the artifact to be made, and the folder that becomes it.

    Attributes:
        root: the store.
        stage: the stage.
        key: its key.
        folder: the folder that becomes the artifact.
        manifest: the manifest without its files.
        drop: shell patterns of the files that are deleted first.
        replaces: creation time of the artifact that gives way; any other one wins.
    """

    root: Path
    stage: str
    key: str
    folder: Path
    manifest: Manifest
    drop: tuple[str, ...]
    replaces: str | None = None

    @property
    def target(self) -> Path:
        """Where the artifact will be."""
        return self.root / self.stage / self.key

    @property
    def note(self) -> Path:
        """The file that says a publication is under way."""
        return note_path(self.root, self.stage, self.key)


def staging_folder(root: Path, stage: str, key: str) -> Path:
    """Return where (stage, key) is worked on."""
    return root / ".staging" / f"{stage}-{key}"


def note_path(root: Path, stage: str, key: str) -> Path:
    """Return where the publication of (stage, key) is noted."""
    return root / ".staging" / f"{stage}-{key}.publish.json"


def pending(root: Path, stage: str, key: str) -> Publication | None:
    """Return the publication that was cut off, if its folder is there."""
    note = note_path(root, stage, key)
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        folder = Path(os.path.normpath(note.parent / content["folder"]))
        manifest = Manifest.from_json(content["manifest"])
        drop, replaces = tuple(map(str, content["drop"])), content["replaces"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{note}: not a readable note of a publication ({type(error).__name__}: {error}). "
            f"Remove it; the next run goes on with {stage} from what is left of it"
        ) from error
    if not folder.is_dir():
        return None
    return Publication(root, stage, key, folder, manifest, drop, replaces)


def run(plan: Publication, read: Read, check: Callable[[], None] | None) -> Artifact:
    """Publish (see `Store.publish`).

    Args:
        plan: the publication.
        read: returns the artifact in a folder, or None.
        check: called right before the rename.
    """
    work = f"publishing {plan.stage} {plan.key}"
    remedy = "Make room and run the same command again: it publishes without training again."
    needed = 2 * len(json.dumps(plan.manifest.to_json())) + unallocated(plan.folder)
    with disk_full_is_user_error(plan.root, work, needed, remedy):
        published = _published(plan, read, check)
    _tidy(plan)
    return published


def _published(plan: Publication, read: Read, check: Callable[[], None] | None) -> Artifact:
    left = ATTEMPTS
    while True:
        if (published := _winner(plan, read)) is not None:
            return published
        try:
            _prepare(plan)
            if check is not None:
                check()
            return _rename(plan, read)
        except FileNotFoundError:
            # Another process publishes the same folder: files go, and in the end all is renamed.
            left -= 1
            if not left and _winner(plan, read) is None:
                raise
            time.sleep(PAUSE_S)


def _winner(plan: Publication, read: Read) -> Artifact | None:
    """Return the artifact that is there already, unless it is the one to be replaced."""
    published = read(plan.target)
    if published is not None and published.manifest.created == plan.replaces:
        return None
    return published


def _prepare(plan: Publication) -> None:
    plan.note.parent.mkdir(parents=True, exist_ok=True)
    plan.target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "folder": os.path.relpath(plan.folder, plan.note.parent),
        "manifest": replace(plan.manifest, stage=plan.stage, key=plan.key, files={}).to_json(),
        "drop": list(plan.drop),
        "replaces": plan.replaces,
    }
    write_json_atomic(plan.note, content)
    _drop(plan.folder, plan.drop)
    for draft in list(drafts_below(plan.folder, of_libraries=True)):
        shred(draft)
    _settle_links(plan.folder)
    files = {}
    # safetensors lets nobody but the owner read its files; a note is as readable as others' are.
    readable = plan.note.stat().st_mode & 0o666
    for path in files_below(plan.folder):
        path.chmod(path.stat().st_mode | readable)
        name = path.relative_to(plan.folder).as_posix()
        if name != MANIFEST:
            files[name] = FileEntry(file_digest_once(path), path.stat().st_size)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "nothing to publish in", str(plan.folder))
    sync_tree(plan.folder)
    whole = replace(plan.manifest, stage=plan.stage, key=plan.key, files=files)
    write_json_atomic(plan.folder / MANIFEST, whole.to_json())


def _rename(plan: Publication, read: Read) -> Artifact:
    for _ in range(2):
        try:
            plan.folder.rename(plan.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if (published := _winner(plan, read)) is not None:
                return published
            # What is there is to be replaced, or has no manifest and cannot be used: it gives way,
            # if possible without a moment in which nothing is there.
            if not exchange(plan.folder, plan.target):
                delete(plan.root, plan.target)
                continue
        sync(plan.target.parent)
        sync(plan.folder.parent)
        published = read(plan.target)
        if published is None:
            raise FileNotFoundError(errno.ENOENT, "removed while publishing", str(plan.target))
        return published
    raise UserError(f"{plan.target}: something else keeps writing there; move it away, run again")


def _tidy(plan: Publication) -> None:
    staging = staging_folder(plan.root, plan.stage, plan.key)
    for leftover in {staging, plan.folder}:
        delete(plan.root, leftover)
    plan.note.unlink(missing_ok=True)


def _drop(folder: Path, patterns: tuple[str, ...]) -> None:
    """Delete the files that fit a pattern; `name/*` also takes the emptied folder `name`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if not os.path.lexists(path) or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        for emptied in path.parents:
            if emptied == folder or any(emptied.iterdir()):
                break
            with suppress(OSError):
                emptied.rmdir()


def _settle_links(folder: Path) -> None:
    """Leave no link that breaks when the folder moves: copy files from outside, drop the rest."""
    inside = folder.resolve()
    for path in list(folder.rglob("*")):
        if not path.is_symlink():
            continue
        goal = path.resolve()
        if goal.is_relative_to(inside) and not Path(os.readlink(path)).is_absolute():
            continue
        path.unlink()
        if goal.is_file():
            shutil.copy2(goal, path)


def delete(root: Path, path: Path) -> None:
    """Delete a file or folder so that nobody sees it half deleted: rename it away first."""
    trash = root / ".trash"
    trash.mkdir(parents=True, exist_ok=True)
    aside = trash / f"{path.parent.name}-{path.name}-{secrets.token_hex(6)}"
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    shred(aside)


def shred(path: Path) -> None:
    """Delete a file or folder for which nobody looks; another process may be deleting it too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
