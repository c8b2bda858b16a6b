"""The store: artifacts by stage and key, each there whole or not at all.

Layout below the root:

    <stage>/<key>/                  an artifact: the stage's files and manifest.json
    .staging/<stage>-<key>/         work in progress; kept for resuming until it is published
    .staging/<stage>-<key>.publish.json   a publication that has begun
    .leases/                        see `lease`
    .trash/                         folders that are being deleted
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.store import gc, publish
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.gc import Removal

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")
KEY_NAME = re.compile(r"[A-Za-z0-9_]+")


class Store:
    """Artifacts below one folder."""

    def __init__(self, root: Path) -> None:
        """Use the folder `root`; it is created when something is written."""
        self.root = Path(root).absolute()

    def folder(self, stage: str, key: str) -> Path:
        """Return where the artifact is or would be."""
        _check_names(stage, key)
        return self.root / stage / key

    def lookup(self, stage: str, key: str) -> Artifact | None:
        """Return the artifact, or None when there is none; marks it as used now.

        Raises:
            UserError: there is one whose manifest cannot be read.
        """
        artifact = self._read(self.folder(stage, key))
        if artifact is None:
            return None
        try:
            # The manifest's time says when the artifact was last used: collection goes by it.
            os.utime(artifact.path / MANIFEST)
        except FileNotFoundError:
            return None
        except OSError:
            # A store that may only be read is as good.
            pass
        return artifact

    def all(self) -> list[Artifact]:
        """Return every artifact with a readable manifest, by time of creation."""
        return sorted(
            self._readable(self._folders()), key=lambda artifact: artifact.manifest.created
        )

    def damaged(self) -> list[Path]:
        """Return the artifact folders without a readable manifest."""
        damaged = [folder for folder in self._folders() if not any(self._readable([folder]))]
        return [folder for folder in damaged if folder.exists()]  # not deleted meanwhile

    def find(self, prefix: str) -> list[Artifact]:
        """Return the artifacts whose key begins with `prefix` (`1f3a`, or `ppo/1f3a`)."""
        stage, slash, start = prefix.rpartition("/")
        folders = (
            folder
            for folder in self._folders()
            if folder.name.startswith(start) and (not slash or folder.parent.name == stage)
        )
        return sorted(self._readable(folders), key=lambda artifact: artifact.manifest.created)

    def get(self, prefix: str) -> Artifact:
        """Return the one artifact whose key begins with `prefix`.

        Raises:
            UserError: there is none, or several; they are named.
        """
        artifacts = self.find(prefix) if prefix.strip("/") else []
        if len(artifacts) == 1:
            return artifacts[0]
        if artifacts:
            names = ", ".join(_name(artifact) for artifact in artifacts[:10])
            raise UserError(
                f"{prefix!r} fits {len(artifacts)} artifacts of {self.root}: {names}; "
                "give more of the key"
            )
        known = ", ".join(_name(artifact) for artifact in self.all()[-5:][::-1]) or "none"
        raise UserError(
            f"no artifact of {self.root} has a key beginning with {prefix!r}; the latest: {known}. "
            "`rlhf-exp store ls` lists all"
        )

    def children(self, key: str) -> list[Artifact]:
        """Return the artifacts that were made from the one with this key."""
        return [artifact for artifact in self.all() if key in artifact.manifest.parents.values()]

    def staging(self, stage: str, key: str) -> Path:
        """Return the folder to work in; created, or that of the interrupted work before.

        Call `publish_pending` first: this forgets a publication that was cut off, because what is
        in the folder is about to change.
        """
        _check_names(stage, key)
        folder = publish.staging_folder(self.root, stage, key)
        folder.mkdir(parents=True, exist_ok=True)
        publish.note_path(self.root, stage, key).unlink(missing_ok=True)
        return folder

    def unfinished(self, stage: str, key: str) -> Path | None:
        """Return the staging folder of interrupted work, or None; changes nothing."""
        _check_names(stage, key)
        folder = publish.staging_folder(self.root, stage, key)
        return folder if folder.is_dir() and any(folder.iterdir()) else None

    def discard(self, stage: str, key: str) -> None:
        """Delete the staging folder, so that the work starts afresh. Hold the lease."""
        _check_names(stage, key)
        publish.note_path(self.root, stage, key).unlink(missing_ok=True)
        publish.delete(self.root, publish.staging_folder(self.root, stage, key))

    def publish(
        self,
        stage: str,
        key: str,
        folder: Path,
        manifest: Manifest,
        drop: Iterable[str] = (),
        *,
        check: Callable[[], None] | None = None,
        replaces: Artifact | None = None,
    ) -> Artifact:
        """Make `folder` the artifact (stage, key): whole, or not at all.

        Killed in the middle or out of disk space, it leaves the staging folder and a note of what
        was under way: `publish_pending` finishes it in the next run, without training again.

        Args:
            stage: the stage; a name for a folder, without hyphens.
            key: its key.
            folder: the staging folder, or a folder on the same file system.
            manifest: all but `files`, which is filled in here.
            drop: shell patterns on relative names (`checkpoints/*`) of what is deleted first.
            check: called right before the rename; pass `lease.check`.
            replaces: the artifact that was made again on purpose; any other one there wins.

        Returns:
            The artifact; that of another process if it was faster.

        Raises:
            UserError: the disk is full; says how much is needed and how much is free.
            LeaseLost: from `check`.
        """
        _check_names(stage, key)
        plan = publish.Publication(
            self.root,
            stage,
            key,
            Path(folder).absolute(),
            manifest,
            tuple(drop),
            None if replaces is None else replaces.manifest.created,
        )
        return publish.run(plan, self._read, check)

    def publish_pending(
        self, stage: str, key: str, *, check: Callable[[], None] | None = None
    ) -> Artifact | None:
        """Finish a publication that was cut off; None when there is none. Hold the lease."""
        _check_names(stage, key)
        plan = publish.pending(self.root, stage, key)
        return None if plan is None else publish.run(plan, self._read, check)

    def remove(self, artifact: Artifact, dry_run: bool = False) -> Removal:
        """Delete an artifact.

        Raises:
            UserError: a process is making or holds it.
        """
        return gc.remove(self.root, artifact, dry_run)

    def gc(
        self,
        referenced_keys: Iterable[str],
        dry_run: bool = False,
        *,
        grace_s: float = gc.GRACE_S,
    ) -> list[Removal]:
        """Delete artifacts, staging folders and leftovers that no run refers to.

        Kept: artifacts in `referenced_keys`, those that a live lease holds or names as parents,
        those made, changed or looked up in the last `grace_s` seconds, and all their ancestors.

        Args:
            referenced_keys: the keys in the run records, of finished and unfinished runs.
            dry_run: only say what would be deleted.
            grace_s: seconds for which anything is kept after its last use.

        Returns:
            The deletions, done or planned.
        """
        referenced = set(referenced_keys)
        return gc.collect_garbage(self.root, self.all(), self.damaged, referenced, dry_run, grace_s)

    def _read(self, folder: Path) -> Artifact | None:
        try:
            return Artifact(folder, Manifest.read(folder))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _readable(self, folders: Iterable[Path]) -> Iterator[Artifact]:
        for folder in folders:
            with suppress(UserError):
                if (artifact := self._read(folder)) is not None:
                    yield artifact

    def _folders(self) -> Iterator[Path]:
        """Yield `<stage>/<key>` of whatever looks like an artifact."""
        for stage in sorted(self.root.glob("*/")):
            if STAGE_NAME.fullmatch(stage.name):
                yield from sorted(path for path in stage.iterdir() if KEY_NAME.fullmatch(path.name))


def _name(artifact: Artifact) -> str:
    return f"{artifact.stage}/{artifact.key}"


def _check_names(stage: str, key: str) -> None:
    assert STAGE_NAME.fullmatch(stage), f"stage {stage!r} is no folder name of a stage"
    assert KEY_NAME.fullmatch(key), f"key {key!r} is no key"
