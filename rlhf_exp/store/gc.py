"""Garbage collection: deletes artifacts and leftovers that no run needs, while runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import MANIFEST, Artifact
from rlhf_exp.store.atomic_files import FULL, drafts_below, last_change, tree_size
from rlhf_exp.store.lease import ABANDONED_S, holders, lease_path, try_hold
from rlhf_exp.store.publish import delete, shred

# Between making a parent and taking the lease on its child, and between looking an artifact up and
# writing the run record, nothing but the time of the last use speaks for it.
GRACE_S = 3600.0


@dataclass(frozen=True)
class Removal:
    """A deletion, done or planned: where, how many bytes, why."""

    path: Path
    bytes: int
    reason: str


def remove(root: Path, artifact: Artifact, dry_run: bool) -> Removal:
    """Delete one artifact (see `Store.remove`)."""
    removal = Removal(artifact.path, tree_size(artifact.path), "asked for")
    for holder in holders(root):
        if artifact.key == holder.key or artifact.key in holder.parents:
            raise UserError(
                f"{artifact.stage}/{artifact.key} is in use: {holder} works on {holder.stage} "
                f"{holder.key}. Wait for it or end it first"
            )
    if not dry_run:
        with _exclusively(root, artifact.stage, artifact.key) as held:
            if not held:
                raise UserError(f"{artifact.stage}/{artifact.key} is being made now; wait for it")
            delete(root, artifact.path)
    return removal


def collect_garbage(
    root: Path,
    artifacts: list[Artifact],
    damaged: Callable[[], list[Path]],
    referenced: set[str],
    dry_run: bool,
    grace_s: float,
) -> list[Removal]:
    """Delete everything that nothing keeps (see `Store.gc`).

    Args:
        root: the store's folder.
        artifacts: all artifacts of the store.
        damaged: returns the artifact folders without a readable manifest; called after artifacts
            were deleted.
        referenced: the keys in the run records.
        dry_run: only say what would be deleted.
        grace_s: seconds for which anything is kept after its last use.
    """
    kept = _kept(root, artifacts, referenced, grace_s)
    removals = []
    for stage, key, removal in [*_unreferenced(artifacts, kept), *_stagings(root, kept, grace_s)]:
        if dry_run or _delete(root, stage, key, removal.path, grace_s):
            removals.append(removal)
    for path, reason in _leftovers(root, damaged, kept, grace_s):
        removals.append(Removal(path, tree_size(path), reason))
        if not dry_run:
            _discard(root, path)
    return removals


def _kept(root: Path, artifacts: list[Artifact], referenced: set[str], grace_s: float) -> set[str]:
    """Return the keys of artifacts that stay: named, held, recently used, and their ancestors."""
    kept = set(referenced)
    for holder in holders(root):
        kept |= {holder.key, *holder.parents}
    kept |= {artifact.key for artifact in artifacts if _used(artifact.path) > time.time() - grace_s}
    parents = {artifact.key: set(artifact.manifest.parents.values()) for artifact in artifacts}
    waiting = list(kept)
    while waiting:
        fresh = parents.get(waiting.pop(), set()) - kept
        kept |= fresh
        waiting.extend(fresh)
    return kept


def _used(folder: Path) -> float:
    """Time of an artifact's last lookup, seconds since the epoch; now if it is gone."""
    try:
        return (folder / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _unreferenced(artifacts: list[Artifact], kept: set[str]) -> Iterator[tuple[str, str, Removal]]:
    for artifact in artifacts:
        if artifact.key not in kept:
            removal = Removal(artifact.path, tree_size(artifact.path), "no run refers to it")
            yield artifact.stage, artifact.key, removal


def _stagings(root: Path, kept: set[str], grace_s: float) -> Iterator[tuple[str, str, Removal]]:
    held = {(holder.stage, holder.key) for holder in holders(root)}
    for path in sorted((root / ".staging").glob("[!.]*")):
        stage, _, key = path.name.removesuffix(".publish.json").partition("-")
        if (stage, key) in held or last_change(path) > time.time() - grace_s:
            continue
        if (root / stage / key / MANIFEST).is_file():
            yield stage, key, Removal(path, tree_size(path), "left over: it is published")
        elif key not in kept:
            size = tree_size(path)
            yield stage, key, Removal(path, size, "unfinished, and no run refers to it")


def _delete(root: Path, stage: str, key: str, path: Path, grace_s: float) -> bool:
    """Delete under the lease, unless somebody holds it or used the path meanwhile."""
    with _exclusively(root, stage, key) as held:
        if not held:
            return False
        newest = _used(path) if (path / MANIFEST).is_file() else last_change(path)
        if newest > time.time() - grace_s or not path.exists():
            return False
        delete(root, path)
        return True


@contextmanager
def _exclusively(root: Path, stage: str, key: str) -> Iterator[bool]:
    """Hold the lease for the block if it is free; yields whether the block may go ahead."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(try_hold(root, stage, key)) is not None
        except OSError as error:
            # Taking a lease writes a file. On a full disk nobody can, and deleting is the way out.
            if error.errno not in FULL:
                raise
            held = not lease_path(root, stage, key).exists()
        yield held


def _leftovers(
    root: Path, damaged: Callable[[], list[Path]], kept: set[str], grace_s: float
) -> Iterator[tuple[Path, str]]:
    """Yield files and folders that dead processes left behind and nobody can need."""
    for path in sorted((root / ".trash").glob("*")):
        yield path, "half deleted"
    for path in damaged():
        if path.name not in kept and last_change(path) <= time.time() - grace_s:
            yield path, "has no readable manifest"
    # Drafts lie where they were to be: also beside the store, of records, notes, caches, reports.
    for folder in (root.parent, root / ".staging", root / ".leases"):
        for path in drafts_below(folder, of_libraries=folder != root.parent):
            if last_change(path) <= time.time() - grace_s:
                yield path, "half written"
    live = {f"{holder.stage}-{holder.key}" for holder in holders(root)}
    works: dict[str, list[Path]] = {}
    for path in sorted((root / ".leases").glob("[!.]*")):
        # Besides marker and note: files that filelock leaves when it is killed while taking over.
        works.setdefault(path.name.partition(".")[0], []).append(path)
    for work in sorted(works.keys() - live):
        newest = max(map(last_change, works[work]))
        if "-" in work and newest <= time.time() - max(grace_s, ABANDONED_S):
            yield lease_path(root, *work.split("-", 1)), "lease of a process that is gone"


def _discard(root: Path, path: Path) -> None:
    if path.parent.name == ".trash" or (path.is_file() and path.suffix != ".lease"):
        shred(path)
    elif path.is_dir():
        delete(root, path)
    else:
        stage, _, key = path.stem.partition("-")
        with try_hold(root, stage, key) as held:
            # Letting it go deletes the marker and the note.
            for leftover in path.parent.glob(f"{path.name}.*") if held else ():
                shred(leftover)
