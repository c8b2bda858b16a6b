"""Disk space by run name: what only its runs need, what they share, what is unfinished, logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.files import human_size, tree_size
from rlhf_exp.store.publish import staging_folder
from rlhf_exp.store.records import Records, RunRecord
from rlhf_exp.store.store import Store

TRACKED = ("wandb/", "wandb-data/")


@dataclass(frozen=True)
class Usage:
    """The disk space of the runs of one name, in bytes.

    Attributes:
        name: Of a run or a sweep.
        points: How many runs have it.
        own: Results that no run of another name needs.
        shared: Results that others need too.
        unfinished: Interrupted or running work.
        logs: Records, submissions to Slurm and their logs.
        tracked: W&B's files, which are a part of the three kinds of results.
    """

    name: str
    points: int
    own: int
    shared: int
    unfinished: int
    logs: int
    tracked: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.own + self.shared + self.unfinished + self.logs

    def __str__(self) -> str:
        """Return `2.1 GB: 1.2 GB of its own, 0.9 GB shared, ...`."""
        parts = [f"{human_size(self.own)} of its own", f"{human_size(self.shared)} shared"]
        if self.unfinished:
            parts.append(f"{human_size(self.unfinished)} unfinished")
        parts.append(f"{human_size(self.logs)} records and logs")
        tracked = f" ({human_size(self.tracked)} of it W&B's)" if self.tracked else ""
        return f"{human_size(self.total)}: {', '.join(parts)}{tracked}"


def size_of(store: Store, records: Records, name: str) -> Usage:
    """Return the disk space of the runs of one name."""
    (found,) = sizes(store, records, [name])
    return found


def sizes(store: Store, records: Records, names: Iterable[str] | None = None) -> list[Usage]:
    """Return the disk space of each name, the largest of their own first; marks nothing as used.

    Args:
        store: The store.
        records: The records of its runs.
        names: Those wanted; all by default.
    """
    artifacts = {one.key: one for one in store.all()}
    runs: dict[str, list[RunRecord]] = {}
    for record in records.all():
        runs.setdefault(record.name, []).append(record)
    reached = {name: set(_reached(found, artifacts)) for name, found in runs.items()}
    wanted = sorted(runs) if names is None else list(names)
    found = [
        _usage(store, records, name, runs.get(name, []), reached, artifacts) for name in wanted
    ]
    return sorted(found, key=lambda one: -one.own)


def users(records: Records) -> dict[str, list[str]]:
    """Return the names whose runs came to a key, by key."""
    found: dict[str, set[str]] = {}
    for record in records.all():
        for key in record.keys.values():
            found.setdefault(key, set()).add(record.name)
    return {key: sorted(names) for key, names in found.items()}


def _usage(
    store: Store,
    records: Records,
    name: str,
    runs: list[RunRecord],
    reached: Mapping[str, set[str]],
    artifacts: Mapping[str, Artifact],
) -> Usage:
    keys = reached.get(name, set())
    others = set().union(*(one for other, one in reached.items() if other != name))
    works = {(stage, key) for record in runs for stage, key in record.keys.items()}
    folders = [staging_folder(store.root, stage, key) for stage, key in sorted(works)]
    return Usage(
        name=name,
        points=len(runs),
        own=sum(_size(artifacts[key]) for key in keys - others),
        shared=sum(_size(artifacts[key]) for key in keys & others),
        unfinished=sum(map(tree_size, folders)),
        logs=tree_size(records.root / name),
        tracked=sum(_tracked(artifacts[key]) for key in keys) + sum(map(_tracked_below, folders)),
    )


def _reached(runs: list[RunRecord], artifacts: Mapping[str, Artifact]) -> Iterator[str]:
    """Yield the keys of the results that runs came to, and of what these were made from."""
    seen: set[str] = set()
    waiting = [key for record in runs for key in record.keys.values()]
    while waiting:
        key = waiting.pop()
        if key not in seen and key in artifacts:
            seen.add(key)
            waiting.extend(artifacts[key].manifest.parents.values())
            yield key


def _size(one: Artifact) -> int:
    return one.size + tree_size(one.path / "manifest.json")


def _tracked(one: Artifact) -> int:
    files = one.manifest.files.items()
    return sum(entry.size for name, entry in files if name.startswith(TRACKED))


def _tracked_below(folder: Path) -> int:
    return sum(tree_size(folder / part) for part in TRACKED)
