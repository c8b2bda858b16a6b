"""Several runs as one HTML file that needs no network and trusts none of the text in it.

Its one script sorts tables, and is all that its security policy allows to run (by digest).

The tables of a sweep's page: cells as text, with the number that sorts them.

Several runs as JSON and as CSV: the page's tables and points, for other programs.

The command line that runs the settings of some runs again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.preference import DASH, format_estimate
from rlhf_exp.report import chart as chart_module
from rlhf_exp.report.chart import duration, render, short
from rlhf_exp.report.run.page import write_page
from rlhf_exp.report.sweep.charts import BANDS, Palette, curves, frontier
from rlhf_exp.report.sweep.data import (
    FEWEST,
    RunGroup,
    RunPoint,
    SeedSummary,
    Sweep,
    best_of,
    grouped,
    is_seed,
    short_key,
)
from rlhf_exp.report.sweep.gather import evaluations
from rlhf_exp.report.template import FOLDER, fill

_INTERVALS = (
    f"Brackets: 95 % percentile-bootstrap intervals of the mean over seeds, from {FEWEST} seeds on "
    "(of exactly 3 that is their range); of fewer seeds the values themselves. With less than "
    "about ten seeds such intervals are too narrow: read them as a hint of the spread."
)
_WINNER = (
    "The best of several is chosen for its luck too: expect somewhat less when it is run with new "
    "seeds."
)


@dataclass(frozen=True)
class BestSettings:
    """The settings to go on with: in words, why, and as a command."""

    label: str
    rule: str
    command: str
    note: str


@dataclass(frozen=True)
class FailedRun:
    """A failed run: which, first and last line of its error, the whole, and where the log is."""

    label: str
    key: str
    first: str
    last: str
    text: str
    log: str


def build_sweep_report(sweep: Sweep, path: Path) -> Path:
    """Write the page and return its path; a page that is there already is replaced at once, whole.

    Args:
        sweep: What to show; all strings in it are untrusted.
        path: The file to write; its folder is made if missing.
    """
    return write_page(render_sweep(sweep), path)


def render_sweep(sweep: Sweep) -> str:
    """Return the page as HTML."""
    here = FOLDER / "sweep"
    css = (FOLDER / "page.css").read_text("utf-8") + (here / "sweep.css").read_text("utf-8")
    script = (here / "sort.js").read_text("utf-8")
    groups, palette = grouped(sweep.points), Palette(sweep)
    chart, several = frontier(sweep, palette), any(len(one.points) > 1 for one in groups)
    return fill(
        "sweep/sweep.html",
        sweep=sweep,
        css=Markup(css),
        script=Markup(script),
        style_digest=_digest(css),
        script_digest=_digest(script),
        identity=_identity(sweep, groups),
        best=best_settings(sweep, groups),
        frontier=None if chart is None else render(chart),
        second=palette.dash.name,
        curves=[
            (title, [render(one) for one in charts]) for title, charts in curves(sweep, palette)
        ],
        curve_note=_curve_note(groups),
        groups=groups_table(sweep, groups) if several else None,
        interval_note=_INTERVALS,
        runs=runs_table(sweep),
        shares=[
            (short_key(name), _bar(share), f"{100 * share:.0f} %")
            for name, share in sweep.importance.shares
        ],
        failures=[failure_of(point) for point in sweep.points if point.status == "failed"],
        time_note=_time_note(sweep),
        shared=_shared(sweep),
    )


def best_settings(sweep: Sweep, groups: Sequence[RunGroup]) -> BestSettings | None:
    """Return the settings with the highest mean objective, and how far the next ones are."""
    ranked = best_of(groups)
    if not ranked or len(groups) < 2:
        return None
    group, found = ranked[0]
    seeds = len(found.values)
    rule = (
        f"The highest objective of {len(groups)} settings, as the mean over seeds: "
        f"{in_words(found)}, {seeds} seed{'s' if seeds > 1 else ''}. The objective is "
        f"{sweep.objective}."
    )
    if len(ranked) > 1:
        other, next_found = ranked[1]
        rule += f" The next, {other.label}, has {in_words(next_found)}."
    return BestSettings(group.label, rule, command_of(group), _WINNER)


def failure_of(point: RunPoint) -> FailedRun:
    """Return what is shown of a failed run."""
    lines = (point.error or "").strip().splitlines() or ["no message was recorded"]
    text = point.error or "" if len(lines) > 1 else ""
    return FailedRun(point.label, point.key, lines[0], lines[-1], text, point.log)


def _identity(sweep: Sweep, groups: Sequence[RunGroup]) -> list[tuple[str, str]]:
    counts = Counter(point.status for point in sweep.points)
    states = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    rows = [("Runs", f"{len(sweep.points)}: {states}")]
    if sweep.varied:
        rows.append(("Varied", ", ".join(sweep.varied)))
    seeds = {len(group.points) for group in groups}
    low, high = min(seeds), max(seeds)
    rows.append(("Settings", str(len(groups))))
    rows.append(("Seeds of each", str(low) if low == high else f"{low} to {high}"))
    rows.append(("Objective", sweep.objective))
    return rows


def _curve_note(groups: Sequence[RunGroup]) -> str:
    several = any(len(group.points) > 1 for group in groups)
    if not several:
        return "One line a run, by its evaluations on validation data."
    note = "One line a setting: the mean over its finished seeds."
    if len(groups) > BANDS:
        return f"{note} Intervals are left to the table below: here they would hide each other."
    if any(len(group.points) >= FEWEST for group in groups):
        return f"{note} {_INTERVALS.replace('Brackets', 'Bands')}"
    return f"{note} Bands, the intervals over seeds, are drawn from {FEWEST} seeds on."


def _bar(share: float) -> Markup:
    width = 100 * min(max(share, 0.0), 1.0)
    rect = chart_module.element("rect", x=0, y=0, width=width, height=16, rx=1)
    return chart_module.element(
        "svg", rect, viewBox="0 0 100 16", preserveAspectRatio="none", aria_hidden="true"
    )


def _time_note(sweep: Sweep) -> str:
    spent = sum(one.seconds for one in sweep.works)
    saved = sum(one.seconds * (one.users - 1) for one in sweep.works)
    note = f"Finished stages took {duration(spent)} in all."
    if saved:
        note += f" Sharing what the runs have in common saved {duration(saved)}."
    return note


def _shared(sweep: Sweep) -> Table | None:
    works = [one for one in sweep.works if one.users > 1]
    heads = [
        Column("Stage", number=False),
        Column("Key", number=False),
        Column("Runs"),
        Column("Time"),
    ]
    rows = [
        [
            TableCell(one.stage),
            TableCell(one.key, kind="key"),
            TableCell(str(one.users), float(one.users)),
            TableCell(duration(one.seconds), one.seconds),
        ]
        for one in works
    ]
    return Table(heads, rows) if rows else None


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
class TableCell:
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
    rows: Sequence[Sequence[TableCell]]


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
            TableCell(f"{point.name}/{point.key[:8]}" if names else point.key[:8], kind="key"),
            TableCell(point.status, kind=f"state {point.status}"),
            *(_setting(text) for text in point.settings.values()),
            *([_setting(point.seed)] if seeds else []),
            _number(point.objective),
            *(_number(point.metrics.get(metric)) for _, metric in columns),
            TableCell(duration(point.seconds), _or_nan(point.seconds)),
        ]
        rows.append(row)
    return Table(heads, rows)


def groups_table(sweep: Sweep, groups: Sequence[RunGroup]) -> Table:
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
            TableCell(str(done) if done == begun else f"{done} of {begun}", float(done)),
            _summary(group.objective()),
            *(_summary(group.metric(metric)) for _, metric in columns),
        ]
        rows.append(row)
    return Table(heads, rows)


def in_words(summary: SeedSummary) -> str:
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


def _rank(point: RunPoint) -> tuple[bool, float]:
    known = point.done and point.objective is not None and math.isfinite(point.objective)
    return not known, -(point.objective or 0.0) if known else 0.0


def _setting(text: str) -> TableCell:
    try:
        return TableCell(text, float(text))
    except ValueError:
        return TableCell(text)


def _number(value: float | None) -> TableCell:
    if value is None or not math.isfinite(value):
        return TableCell(DASH, math.nan)
    return TableCell(short(value), value)


def _summary(summary: SeedSummary | None) -> TableCell:
    if summary is None:
        return TableCell(DASH, math.nan)
    return TableCell(in_words(summary), summary.estimate.mean)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Return everything but the curves as values that JSON has; what is not finite is null."""
    groups = grouped(sweep.points)
    importance = sweep.importance
    return {
        "title": sweep.title,
        "stage": sweep.stage,
        "objective": sweep.objective,
        "kl_budget": sweep.kl_budget,
        "varied": list(sweep.varied),
        "runs": [_run(point) for point in sweep.points],
        "groups": [_group(group) for group in groups],
        "best": _best(groups),
        "importance": {
            "trials": importance.trials,
            "shares": dict(importance.shares),
            "reason": importance.reason or None,
        },
        "works": [
            {"stage": one.stage, "key": one.key, "seconds": one.seconds, "users": one.users}
            for one in sweep.works
        ],
        "disk": dict(sweep.disk),
        "warnings": list(sweep.warnings),
    }


def to_csv(sweep: Sweep) -> str:
    """Return one line a run: what it is, its settings, its final metrics, its error's last line."""
    names = sorted({name for point in sweep.points for name in point.metrics})
    fixed = ["name", "key", "status", "seed"]
    columns = [*fixed, *sweep.varied, "objective", "seconds", *names, "error", "log"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for point in sweep.points:
        cells: Mapping[str, Any] = {
            "name": point.name,
            "key": point.key,
            "status": point.status,
            "seed": point.seed,
            **point.settings,
            "objective": _plain(point.objective),
            "seconds": point.seconds,
            **{name: _plain(value) for name, value in point.metrics.items()},
            "error": last_line(point.error),
            "log": point.log,
        }
        writer.writerow("" if cells.get(name) is None else cells[name] for name in columns)
    return buffer.getvalue()


def last_line(error: str | None) -> str:
    """Return the last line of an error that says something."""
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


def _run(point: RunPoint) -> dict[str, Any]:
    found = evaluations(point.rows)
    return {
        "name": point.name,
        "key": point.key,
        "keys": dict(point.keys),
        "status": point.status,
        "overrides": list(point.overrides),
        "settings": dict(point.settings),
        "seed": point.seed or None,
        "objective": _plain(point.objective),
        "metrics": {name: _plain(value) for name, value in point.metrics.items()},
        "evaluations": [{"step": step, "reward": reward, "kl": kl} for step, reward, kl in found],
        "seconds": point.seconds,
        "error": point.error,
        "log": point.log or None,
    }


def _group(group: RunGroup) -> dict[str, Any]:
    names = sorted({name for point in group.done for name in point.metrics})
    objective = group.objective()
    found = {name: group.metric(name) for name in names}
    return {
        "settings": dict(group.settings),
        "seeds": [point.seed for point in group.done],
        "objective": None if objective is None else objective.to_json(),
        "metrics": {name: one.to_json() for name, one in found.items() if one is not None},
    }


def _best(groups: list[RunGroup]) -> dict[str, Any] | None:
    ranked = best_of(groups)
    if not ranked:
        return None
    group, found = ranked[0]
    return {
        "settings": dict(group.settings),
        "objective": found.to_json(),
        "command": command_of(group),
    }


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# What made it a part of a multirun, and not what was trained.
_LEFT_OUT = ("name", "hydra", "launcher", "study", "sweep")


def command_of(group: RunGroup) -> str:
    """Return the command of a group's settings, without a seed; empty if it is not recorded."""
    point = next((one for one in (*group.done, *group.points) if one.overrides), None)
    if point is None:
        return ""
    seeds = {one.seed for one in group.points}
    kept = []
    for text in point.overrides:
        key = text.partition("=")[0].lstrip("+~")
        varied_seed = is_seed(key) and len(seeds) > 1
        if key.replace("/", ".").split(".")[0] not in _LEFT_OUT and not varied_seed:
            kept.append(text)
    return f"python launch.py {shlex.join([f'name={point.name}-best', *kept])}"
