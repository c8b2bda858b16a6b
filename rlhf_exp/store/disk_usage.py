"""Disk space by run name, and the results that a retention rule keeps.

The space of a name is divided into results of its own, results shared with other names, unfinished
work, and logs. Garbage collection keeps the results that runs refer to, less those that a rule lets
go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.atomic_files import human_size, tree_size
from rlhf_exp.store.publish import staging_folder
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store

TRACKED = ("wandb/", "wandb-data/", "tensorboard/")


@dataclass(frozen=True)
class DiskUsage:
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


def size_of(store: Store, records: Records, name: str) -> DiskUsage:
    """Return the disk space of the runs of one name."""
    (usage,) = sizes(store, records, [name])
    return usage


def sizes(store: Store, records: Records, names: Iterable[str] | None = None) -> list[DiskUsage]:
    """Return the disk space of each name, the largest of their own first; marks nothing as used.

    Args:
        store: The store.
        records: The records of its runs.
        names: Those wanted; all by default.
    """
    artifacts = {artifact.key: artifact for artifact in store.all()}
    runs: dict[str, list[RunRecord]] = {}
    for record in records.all():
        runs.setdefault(record.name, []).append(record)
    reached = {name: set(_reached(records_of, artifacts)) for name, records_of in runs.items()}
    wanted = sorted(runs) if names is None else list(names)
    usages = [
        _usage(store, records, name, runs.get(name, []), reached, artifacts) for name in wanted
    ]
    return sorted(usages, key=lambda usage: -usage.own)


def users(records: Records) -> dict[str, list[str]]:
    """Return the names whose runs came to a key, by key."""
    names_of: dict[str, set[str]] = {}
    for record in records.all():
        for key in record.keys.values():
            names_of.setdefault(key, set()).add(record.name)
    return {key: sorted(names) for key, names in names_of.items()}


def _usage(
    store: Store,
    records: Records,
    name: str,
    runs: list[RunRecord],
    reached: Mapping[str, set[str]],
    artifacts: Mapping[str, Artifact],
) -> DiskUsage:
    keys = reached.get(name, set())
    others = set().union(*(keys for other, keys in reached.items() if other != name))
    works = {(stage, key) for record in runs for stage, key in record.keys.items()}
    folders = [staging_folder(store.root, stage, key) for stage, key in sorted(works)]
    return DiskUsage(
        name=name,
        points=len(runs),
        own=sum(_size(artifacts[key]) for key in keys - others),
        shared=sum(_size(artifacts[key]) for key in keys & others),
        unfinished=sum(map(tree_size, folders)),
        logs=tree_size(records.root / name),
        tracked=sum(_tracked(artifacts[key]) for key in keys) + sum(map(_tracked_below, folders)),
    )


def _reached(runs: list[RunRecord], artifacts: Mapping[str, Artifact]) -> Iterator[str]:
    """Yield the keys of the results that runs came to, and of all their ancestors."""
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


# The others may go on at any time, and their results would be missed.
ENDED = (Status.done, Status.failed, Status.pruned)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")


class RetentionRank(StrEnum):
    """The order in which runs are worth keeping."""

    best = "best"
    last = "last"


@dataclass(frozen=True)
class RetentionRule:
    """Of the ended runs of a name, keep the results of this many.

    Attributes:
        name: Of the runs.
        by: `best`: those with the highest objectives; `last`: those begun last.
        count: How many.
    """

    name: str
    by: RetentionRank
    count: int

    @classmethod
    def parse(cls, name: str, text: str) -> RetentionRule:
        """Read `best:3` or `last:5`.

        Raises:
            UserError: It is neither.
        """
        by, _, count = text.partition(":")
        if by not in RetentionRank.__members__ or not count.isascii() or not count.isdigit():
            raise UserError(
                f"--keep {text}: expected best:N or last:N, such as best:3 (the three runs with "
                "the highest objectives)"
            )
        return cls(name, RetentionRank(by), int(count))

    def forgets(self, records: Collection[RunRecord]) -> list[RunRecord]:
        """Return the runs, of those of its name, whose results it lets go.

        Runs that have not ended stay, whatever their number. One that has failed or was pruned, or
        has no objective, is never among the best.
        """
        ended = [record for record in records if record.status in ENDED]
        if self.by is RetentionRank.last:
            return sorted(ended, key=lambda record: record.created, reverse=True)[self.count :]
        ranked = sorted(filter(_is_ranked, ended), key=lambda record: -_objective(record))
        return ranked[self.count :] + [record for record in ended if not _is_ranked(record)]


def _is_ranked(record: RunRecord) -> bool:
    return record.status is Status.done and math.isfinite(_objective(record))


def _objective(record: RunRecord) -> float:
    return math.nan if record.objective is None else record.objective


def kept_keys(records: Records, rule: RetentionRule | None = None) -> set[str]:
    """Return the keys of all runs but those that the rule forgets.

    Raises:
        UserError: No run has the rule's name.
    """
    every = records.all()
    if rule is not None:
        named = [record for record in every if record.name == rule.name]
        if not named:
            records.resolve_all(rule.name)  # says which names are near
        gone = {record.key for record in rule.forgets(named)}
        every = [record for record in every if record.name != rule.name or record.key not in gone]
    return {key for record in every for key in record.keys.values()}


def seconds_of(text: str) -> float:
    """Return the seconds in `90`, `30m`, `12h`, `7d` or `2w`.

    Raises:
        UserError: It is no such span.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise UserError(f"--older-than {text}: expected a span such as 90s, 30m, 12h, 7d or 2w")
    return float(match[1]) * _UNITS[match[2]]
