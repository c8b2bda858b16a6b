"""The report of several runs: one HTML file that needs no network and trusts none of its text.

Its one script sorts tables, and is all that its security policy allows to run (by digest). The same
tables and points can be had as JSON and as CSV, for other programs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.preference import DASH, format_estimate
from rlhf_exp.program import PROGRAM
from rlhf_exp.report import chart as chart_module
from rlhf_exp.report.chart import duration, render, short
from rlhf_exp.report.run.page import write_page
from rlhf_exp.report.sweep.charts import (
    BANDS,
    Palette,
    best_of_n_frontier,
    curves,
    frontier,
)
from rlhf_exp.report.sweep.data import (
    FEWEST_SEEDS,
    RunGroup,
    RunPoint,
    SeedSummary,
    Sweep,
    group_runs,
    is_seed,
    rank_groups,
    short_key,
)
from rlhf_exp.report.sweep.gather import evaluations
from rlhf_exp.report.template import FOLDER, fill

_INTERVAL_NOTE = (
    f"Brackets: 95 % intervals of the mean over seeds (Student's t), from {FEWEST_SEEDS} seeds on; "
    "of fewer seeds the values themselves. With 3 seeds they are wide: a mean and its spread are "
    "then known that badly."
)
_WINNER_NOTE = (
    "The best of several is chosen for its luck too: expect somewhat less when it is run with new "
    "seeds."
)
# (heading, metric) of the columns, as far as any run has them.
COLUMNS = (
    ("Reward, validation", "ppo eval/reward_mean"),
    ("Wins, validation", "ppo eval/win_rate"),
    ("KL, nats", "ppo eval/kl_sequence"),
    ("Length, tokens", "ppo eval/length_mean"),
    ("Test gain, SFT std", "eval eval/reward/gain_in_std"),
    ("PPO over best of n, test", "eval frontier/PPO/over_best_of/reward"),
    ("DPO over best of n, test", "eval frontier/DPO/over_best_of/reward"),
    ("Test win share", "eval eval/outcome/ties_as_half"),
    ("Accuracy, test", "reward test/accuracy"),
    ("Perplexity, validation", "sft eval/perplexity"),
)
_EARLIER_STAGES = ("reward test/accuracy", "sft eval/perplexity")
# Keys that made the run a part of a multirun, and do not change the training.
_LAUNCH_KEYS = ("name", "hydra", "launcher", "study", "sweep")


def build_sweep_report(sweep: Sweep, path: Path) -> Path:
    """Write the page and return its path; a page that is there already is replaced at once, whole.

    Args:
        sweep: The content; all strings in it are untrusted.
        path: The file to write; its folder is made if missing.
    """
    return write_page(render_sweep(sweep), path)


def render_sweep(sweep: Sweep) -> str:
    """Return the page as HTML."""
    here = FOLDER / "sweep"
    css = (FOLDER / "page.css").read_text("utf-8") + (here / "sweep.css").read_text("utf-8")
    script = (here / "sort.js").read_text("utf-8")
    groups, palette = group_runs(sweep.points), Palette(sweep)
    chart, several = frontier(sweep, palette), any(len(group.points) > 1 for group in groups)
    best_of = best_of_n_frontier(sweep, palette)
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
        best_of=None if best_of is None else render(best_of),
        second=palette.dash.name,
        curves=[
            (title, [render(chart) for chart in charts]) for title, charts in curves(sweep, palette)
        ],
        curve_note=_curve_note(groups),
        groups=groups_table(sweep, groups) if several else None,
        interval_note=_INTERVAL_NOTE,
        runs=runs_table(sweep),
        shares=[
            (short_key(name), _bar(share), f"{100 * share:.0f} %")
            for name, share in sweep.importance.shares
        ],
        failures=[failure_of(point) for point in sweep.points if point.status == "failed"],
        time_note=_time_note(sweep),
        shared=_shared_table(sweep),
    )


@dataclass(frozen=True)
class BestSettings:
    """The settings to go on with: in words, why, and as a command."""

    label: str
    rule: str
    command: str
    note: str


def best_settings(sweep: Sweep, groups: Sequence[RunGroup]) -> BestSettings | None:
    """Return the settings with the highest mean objective, and how far the next ones are."""
    ranked = rank_groups(groups)
    if not ranked or len(groups) < 2:
        return None
    group, objective = ranked[0]
    seeds = len(objective.values)
    rule = (
        f"The highest objective of {len(groups)} settings, as the mean over seeds: "
        f"{summary_text(objective)}, {seeds} seed{'s' if seeds > 1 else ''}. The objective is "
        f"{sweep.objective}."
    )
    if len(ranked) > 1:
        other, next_objective = ranked[1]
        rule += f" The next, {other.label}, has {summary_text(next_objective)}."
    return BestSettings(group.label, rule, command_of(group), _WINNER_NOTE)


def command_of(group: RunGroup) -> str:
    """Return the command of a group's settings, without a seed; empty if it is not recorded."""
    point = next(
        (candidate for candidate in (*group.done, *group.points) if candidate.overrides), None
    )
    if point is None:
        return ""
    seeds = {candidate.seed for candidate in group.points}
    overrides = []
    for text in point.overrides:
        key = text.partition("=")[0].lstrip("+~")
        varied_seed = is_seed(key) and len(seeds) > 1
        if key.replace("/", ".").split(".")[0] not in _LAUNCH_KEYS and not varied_seed:
            overrides.append(text)
    return f"{PROGRAM} {shlex.join([f'name={point.name}-best', *overrides])}"


@dataclass(frozen=True)
class FailedRun:
    """A failed run: which, first and last line of its error, the whole, and where the log is."""

    label: str
    key: str
    first: str
    last: str
    text: str
    log: str


def failure_of(point: RunPoint) -> FailedRun:
    """Return the error of a failed run, first and last line apart."""
    lines = (point.error or "").strip().splitlines() or ["no message was recorded"]
    text = point.error or "" if len(lines) > 1 else ""
    return FailedRun(point.label, point.key, lines[0], lines[-1], text, point.log)


def last_line(error: str | None) -> str:
    """Return the last line of an error that says something."""
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


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
    if any(len(group.points) >= FEWEST_SEEDS for group in groups):
        return f"{note} {_INTERVAL_NOTE.replace('Brackets', 'Bands')}"
    return f"{note} Bands, the intervals over seeds, are drawn from {FEWEST_SEEDS} seeds on."


def _bar(share: float) -> Markup:
    width = 100 * min(max(share, 0.0), 1.0)
    rect = chart_module.element("rect", x=0, y=0, width=width, height=16, rx=1)
    return chart_module.element(
        "svg", rect, viewBox="0 0 100 16", preserveAspectRatio="none", aria_hidden="true"
    )


def _time_note(sweep: Sweep) -> str:
    spent = sum(work.seconds for work in sweep.works)
    saved = sum(work.seconds * (work.users - 1) for work in sweep.works)
    note = f"Finished stages took {duration(spent)} in all."
    if saved:
        note += f" Sharing what the runs have in common saved {duration(saved)}."
    return note


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


@dataclass(frozen=True)
class Table:
    """Columns and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[TableCell]]


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class TableCell:
    """A cell.

    Attributes:
        text: Its text.
        order: The number it is sorted by; `None` sorts it by its text, missing numbers last.
        kind: Its CSS class.
    """

    text: str
    order: float | None = None
    kind: str = ""


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
            *(_setting_cell(text) for text in point.settings.values()),
            *([_setting_cell(point.seed)] if seeds else []),
            _number_cell(point.objective),
            *(_number_cell(point.metrics.get(metric)) for _, metric in columns),
            TableCell(duration(point.seconds), _or_nan(point.seconds)),
        ]
        rows.append(row)
    return Table(heads, rows)


def groups_table(sweep: Sweep, groups: Sequence[RunGroup]) -> Table:
    """Return one row a setting, the best first: means over seeds with their intervals."""
    columns = _columns(sweep)
    heads = [Column(short_key(key), number=False) for key in sweep.varied]
    heads += [Column("Seeds"), Column("Objective"), *(Column(title) for title, _ in columns)]
    ranked = [group for group, _ in rank_groups(groups)]
    ordered = [*ranked, *(group for group in groups if group not in ranked)]
    rows = []
    for group in ordered:
        done, started = len(group.done), len(group.points)
        row = [
            *(_setting_cell(text) for text in group.settings.values()),
            TableCell(str(done) if done == started else f"{done} of {started}", float(done)),
            _summary_cell(group.objective()),
            *(_summary_cell(group.metric(metric)) for _, metric in columns),
        ]
        rows.append(row)
    return Table(heads, rows)


def _shared_table(sweep: Sweep) -> Table | None:
    works = [work for work in sweep.works if work.users > 1]
    heads = [
        Column("Stage", number=False),
        Column("Key", number=False),
        Column("Runs"),
        Column("Time"),
    ]
    rows = [
        [
            TableCell(work.stage),
            TableCell(work.key, kind="key"),
            TableCell(str(work.users), float(work.users)),
            TableCell(duration(work.seconds), work.seconds),
        ]
        for work in works
    ]
    return Table(heads, rows) if rows else None


def _columns(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the columns with values; those of earlier stages only if the values differ."""
    columns = []
    for title, metric in COLUMNS:
        values = {point.metrics[metric] for point in sweep.points if metric in point.metrics}
        if values and (metric not in _EARLIER_STAGES or len(values) > 1 or sweep.stage in metric):
            columns.append((title, metric))
    return columns


def _rank(point: RunPoint) -> tuple[bool, float]:
    known = point.done and point.objective is not None and math.isfinite(point.objective)
    return not known, -(point.objective or 0.0) if known else 0.0


def _setting_cell(text: str) -> TableCell:
    try:
        return TableCell(text, float(text))
    except ValueError:
        return TableCell(text)


def _number_cell(value: float | None) -> TableCell:
    if value is None or not math.isfinite(value):
        return TableCell(DASH, math.nan)
    return TableCell(short(value), value)


def _summary_cell(summary: SeedSummary | None) -> TableCell:
    if summary is None:
        return TableCell(DASH, math.nan)
    return TableCell(summary_text(summary), summary.estimate.mean)


def summary_text(summary: SeedSummary) -> str:
    """Return mean and interval, or mean and the values where seeds are too few for one."""
    if summary.has_interval:
        return format_estimate(summary.estimate)
    if len(summary.values) == 1:
        return short(summary.values[0])
    values = ", ".join(short(value) for value in summary.values)
    return f"{short(summary.estimate.mean)} ({values})"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Return everything but the curves as JSON values; numbers that are not finite are null."""
    groups = group_runs(sweep.points)
    importance = sweep.importance
    return {
        "title": sweep.title,
        "stage": sweep.stage,
        "objective": sweep.objective,
        "kl_budget": sweep.kl_budget,
        "varied": list(sweep.varied),
        "runs": [_run_to_json(point) for point in sweep.points],
        "groups": [_group_to_json(group) for group in groups],
        "best": _best_to_json(groups),
        "importance": {
            "trials": importance.trials,
            "shares": dict(importance.shares),
            "reason": importance.reason or None,
        },
        "works": [
            {"stage": work.stage, "key": work.key, "seconds": work.seconds, "users": work.users}
            for work in sweep.works
        ],
        "disk": dict(sweep.disk),
        "warnings": list(sweep.warnings),
    }


def _run_to_json(point: RunPoint) -> dict[str, Any]:
    points = evaluations(point.rows)
    return {
        "name": point.name,
        "key": point.key,
        "keys": dict(point.keys),
        "status": point.status,
        "overrides": list(point.overrides),
        "settings": dict(point.settings),
        "seed": point.seed or None,
        "objective": _finite_or_none(point.objective),
        "metrics": {name: _finite_or_none(value) for name, value in point.metrics.items()},
        "evaluations": [{"step": step, "reward": reward, "kl": kl} for step, reward, kl in points],
        "seconds": point.seconds,
        "error": point.error,
        "log": point.log or None,
    }


def _group_to_json(group: RunGroup) -> dict[str, Any]:
    names = sorted({name for point in group.done for name in point.metrics})
    objective = group.objective()
    summaries = {name: group.metric(name) for name in names}
    return {
        "settings": dict(group.settings),
        "seeds": [point.seed for point in group.done],
        "objective": None if objective is None else objective.to_json(),
        "metrics": {
            name: summary.to_json() for name, summary in summaries.items() if summary is not None
        },
    }


def _best_to_json(groups: list[RunGroup]) -> dict[str, Any] | None:
    ranked = rank_groups(groups)
    if not ranked:
        return None
    group, objective = ranked[0]
    return {
        "settings": dict(group.settings),
        "objective": objective.to_json(),
        "command": command_of(group),
    }


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def to_table(sweep: Sweep) -> tuple[list[str], list[dict[str, Any]]]:
    """Return a row for each run: identity, settings, final metrics, last line of the error.

    Returns:
        The columns, and each row by column; what a run has no value of is absent or None.
    """
    names = sorted({name for point in sweep.points for name in point.metrics})
    fixed = ["name", "key", "status", "seed"]
    columns = [*fixed, *sweep.varied, "objective", "seconds", *names, "error", "log"]
    rows = [
        {
            "name": point.name,
            "key": point.key,
            "status": point.status,
            "seed": point.seed,
            **point.settings,
            "objective": _finite_or_none(point.objective),
            "seconds": point.seconds,
            **{name: _finite_or_none(value) for name, value in point.metrics.items()},
            "error": last_line(point.error),
            "log": point.log,
        }
        for point in sweep.points
    ]
    return columns, rows


def to_csv(sweep: Sweep) -> str:
    """Return `to_table` as CSV."""
    columns, rows = to_table(sweep)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if row.get(name) is None else row[name] for name in columns)
    return buffer.getvalue()
