"""Which results garbage collection keeps: those that runs refer to, less those a rule lets go."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from rlhf_exp.errors import UserError
from rlhf_exp.store.records import Records, RunRecord, Status

# The others may go on at any time, and their results would be missed.
ENDED = (Status.done, Status.failed, Status.pruned)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")


class By(StrEnum):
    """What makes a run worth keeping."""

    best = "best"
    last = "last"


@dataclass(frozen=True)
class Rule:
    """Of the ended runs of a name, keep the results of this many.

    Attributes:
        name: Of the runs.
        by: `best`: those with the highest objectives; `last`: those begun last.
        count: How many.
    """

    name: str
    by: By
    count: int

    @classmethod
    def parse(cls, name: str, text: str) -> Rule:
        """Read `best:3` or `last:5`.

        Raises:
            UserError: It is neither.
        """
        by, _, count = text.partition(":")
        if by not in By.__members__ or not count.isascii() or not count.isdigit():
            raise UserError(
                f"--keep {text}: expected best:N or last:N, such as best:3 (the three runs with "
                "the highest objectives)"
            )
        return cls(name, By(by), int(count))

    def forgets(self, records: Collection[RunRecord]) -> list[RunRecord]:
        """Return the runs, of those of its name, whose results it lets go.

        Runs that have not ended stay, whatever their number. One that has failed or was pruned, or
        has no objective, is never among the best.
        """
        ended = [one for one in records if one.status in ENDED]
        if self.by is By.last:
            return sorted(ended, key=lambda one: one.created, reverse=True)[self.count :]
        ranked = sorted(filter(_is_ranked, ended), key=lambda one: -_objective(one))
        return ranked[self.count :] + [one for one in ended if not _is_ranked(one)]


def _is_ranked(record: RunRecord) -> bool:
    return record.status is Status.done and math.isfinite(_objective(record))


def _objective(record: RunRecord) -> float:
    return math.nan if record.objective is None else record.objective


def kept_keys(records: Records, rule: Rule | None = None) -> set[str]:
    """Return the keys of all runs but those that the rule forgets.

    Raises:
        UserError: No run has the rule's name.
    """
    every = records.all()
    if rule is not None:
        named = [one for one in every if one.name == rule.name]
        if not named:
            records.resolve_all(rule.name)  # says which names are near
        gone = {one.key for one in rule.forgets(named)}
        every = [one for one in every if one.name != rule.name or one.key not in gone]
    return {key for one in every for key in one.keys.values()}


def seconds_of(text: str) -> float:
    """Return the seconds in `90`, `30m`, `12h`, `7d` or `2w`.

    Raises:
        UserError: It is no such span.
    """
    found = _AGE.fullmatch(text)
    if found is None:
        raise UserError(f"--older-than {text}: expected a span such as 90s, 30m, 12h, 7d or 2w")
    return float(found[1]) * _UNITS[found[2]]
