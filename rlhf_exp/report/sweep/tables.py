"""The tables of a sweep's page: cells as text, with the number that sorts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_exp.evaluation.metric import DASH, format_estimate
from rlhf_exp.report.numbers import duration, short
from rlhf_exp.report.sweep.data import Point, Sweep, short_key
from rlhf_exp.report.sweep.groups import Group, Summary, best_of

# (heading, metric) of the columns, as far as any run has them.
COLUMNS = (
    ("Reward, validation", "ppo eval/reward_mean"),
    ("Wins, validation", "ppo eval/win_rate"),
    ("KL, nats", "ppo eval/kl_sequence"),
    ("Length, tokens", "ppo eval/length_mean"),
    ("Test gain, SFT std", "eval eval/reward/gain_in_std"),
    ("Test win share", "eval eval/outcome/ties_as_half"),
    ("Accuracy, test", "reward test/accuracy"),
    ("Perplexity, validation", "sft eval/perplexity"),
)
_LATER = ("reward test/accuracy", "sft eval/perplexity")


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: What it shows.
        order: The number it is sorted by; `None` sorts it by its text, missing numbers last.
        kind: Its class.
    """

    text: str
    order: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Columns and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def runs_table(sweep: Sweep) -> Table:
    """Return one row a run, the highest objective first, then those without one."""
    columns = _columns(sweep)
    seeds = any(point.seed for point in sweep.points)
    names = len({point.name for point in sweep.points}) > 1
    heads = [Column("Run", number=False), Column("State", number=False)]
    heads += [Column(short_key(key), number=False) for key in sweep.varied]
    heads += [Column("Seed", number=False)] if seeds else []
    heads += [Column("Objective"), *(Column(title) for title, _ in columns), Column("Time")]
    rows = []
    for point in sorted(sweep.points, key=_rank):
        row = [
            Cell(f"{point.name}/{point.key[:8]}" if names else point.key[:8], kind="key"),
            Cell(point.status, kind=f"state {point.status}"),
            *(_setting(text) for text in point.settings.values()),
            *([_setting(point.seed)] if seeds else []),
            _number(point.objective),
            *(_number(point.metrics.get(metric)) for _, metric in columns),
            Cell(duration(point.seconds), _or_nan(point.seconds)),
        ]
        rows.append(row)
    return Table(heads, rows)


def groups_table(sweep: Sweep, groups: Sequence[Group]) -> Table:
    """Return one row a setting, the best first: means over seeds with their intervals."""
    columns = _columns(sweep)
    heads = [Column(short_key(key), number=False) for key in sweep.varied]
    heads += [Column("Seeds"), Column("Objective"), *(Column(title) for title, _ in columns)]
    ranked = [group for group, _ in best_of(groups)]
    ordered = [*ranked, *(group for group in groups if group not in ranked)]
    rows = []
    for group in ordered:
        done, begun = len(group.done), len(group.points)
        row = [
            *(_setting(text) for text in group.settings.values()),
            Cell(str(done) if done == begun else f"{done} of {begun}", float(done)),
            _summary(group.objective()),
            *(_summary(group.metric(metric)) for _, metric in columns),
        ]
        rows.append(row)
    return Table(heads, rows)


def in_words(summary: Summary) -> str:
    """Return mean and interval, or mean and the values where seeds are too few for one."""
    if summary.has_interval:
        return format_estimate(summary.estimate)
    if len(summary.values) == 1:
        return short(summary.values[0])
    values = ", ".join(short(value) for value in summary.values)
    return f"{short(summary.estimate.mean)} ({values})"


def _columns(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the columns that say something: of earlier stages only if these differ."""
    found = []
    for title, metric in COLUMNS:
        values = {point.metrics[metric] for point in sweep.points if metric in point.metrics}
        if values and (metric not in _LATER or len(values) > 1 or sweep.stage in metric):
            found.append((title, metric))
    return found


def _rank(point: Point) -> tuple[bool, float]:
    known = point.done and point.objective is not None and math.isfinite(point.objective)
    return not known, -(point.objective or 0.0) if known else 0.0


def _setting(text: str) -> Cell:
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text)


def _number(value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(DASH, math.nan)
    return Cell(short(value), value)


def _summary(summary: Summary | None) -> Cell:
    if summary is None:
        return Cell(DASH, math.nan)
    return Cell(in_words(summary), summary.estimate.mean)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
