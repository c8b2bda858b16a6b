"""How the points of a multirun have ended: records, the table at the end, the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.errors import JobsFailed
from rlhf_exp.multirun.points import Point
from rlhf_exp.store.records import Records, RunRecord, Status


@dataclass(frozen=True)
class Ending:
    """How a point has ended.

    Attributes:
        objective: What it achieved, if it has an objective.
        error: Message or traceback, for a point that failed.
        seconds: Time it took; `None` for one that was done before.
        log: File with what it printed, if it has one.
        killed: Whether a signal ended its process.
    """

    objective: float | None = None
    error: str | None = None
    seconds: float | None = None
    log: Path | None = None
    killed: bool = False

    @property
    def state(self) -> str:
        """`done`, `cached` or `failed`."""
        if self.error is not None:
            return "failed"
        return "cached" if self.seconds is None else "done"

    @property
    def reason(self) -> str:
        """The error's last line."""
        lines = (self.error or "").strip().splitlines()
        return lines[-1] if lines else ""


def done_before(points: Sequence[Point], records: Records, name: str) -> dict[str, RunRecord]:
    """Return the records, by final key, of points with nothing left to do."""
    found = {record.key: record for record in records.sweep(name)}
    return {
        point.key: found[point.key]
        for point in points
        if not point.config.probe
        and not any(step.needs_work for step in point.steps)
        and point.key in found
        and found[point.key].status is Status.done
    }


def note_failure(
    records: Records, name: str, point: Point, error: str, log: Path | None = None
) -> None:
    """Let a point's record say that it failed: one that was killed could not do so itself."""
    if point.is_worker:
        return
    found = [one for one in records.sweep(name) if one.key == point.key]
    record = found[0] if found else point.record(name)
    if record.status is not Status.failed:
        record = replace(record, status=Status.failed, error=error)
    records.write(replace(record, log=None if log is None else str(log)))


def varied(points: Sequence[Point]) -> dict[str, str]:
    """Return the overrides in which each point differs from the others, by final key."""
    common = set.intersection(*(set(point.overrides) for point in points))
    return {
        point.key: " ".join(text for text in point.overrides if text not in common)
        for point in points
    }


def show(points: Sequence[Point], endings: Mapping[str, Ending], console: Console) -> None:
    """Print how each point has ended."""
    table = Table("point", "state", "key", "objective", "time", box=None, pad_edge=False)
    names = varied(points)
    for key, ending in endings.items():
        objective = "" if ending.objective is None else f"{ending.objective:.4g}"
        seconds = "" if ending.seconds is None else f"{ending.seconds:.0f} s"
        colour = {"failed": "red", "cached": "green"}.get(ending.state, "bold")
        row = (names[key], Text(ending.state, colour), key, objective, seconds)
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print()
    console.print(table)


def failure_of(points: Sequence[Point], endings: Mapping[str, Ending]) -> JobsFailed | None:
    """Return the error that a multirun ends with, if a point has failed."""
    names = varied(points)
    failed = {key: ending for key, ending in endings.items() if ending.error is not None}
    if not failed:
        return None
    lines = []
    for key, ending in failed.items():
        where = f"\n    {ending.log}" if ending.log is not None else ""
        lines.append(f"\n  {names[key] or key}: {ending.reason}{where}")
    return JobsFailed(
        f"{len(failed)} of {len(endings)} points failed; the same command runs what is "
        f"missing:{''.join(lines)}"
    )
