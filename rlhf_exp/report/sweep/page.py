"""Several runs as one HTML file that needs no network and trusts none of the text in it.

Its one script sorts tables, and is all that its security policy allows to run (by digest).
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from rlhf_exp.report import svg
from rlhf_exp.report.numbers import duration
from rlhf_exp.report.page import write_page
from rlhf_exp.report.plot import render
from rlhf_exp.report.sweep.charts import BANDS, Palette, curves, frontier
from rlhf_exp.report.sweep.data import Point, Sweep, short_key
from rlhf_exp.report.sweep.groups import FEWEST, Group, best_of, grouped
from rlhf_exp.report.sweep.launching import command_of
from rlhf_exp.report.sweep.tables import Cell, Column, Table, groups_table, in_words, runs_table
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
class Best:
    """The settings to go on with: in words, why, and as a command."""

    label: str
    rule: str
    command: str
    note: str


@dataclass(frozen=True)
class Failure:
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


def best_settings(sweep: Sweep, groups: Sequence[Group]) -> Best | None:
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
    return Best(group.label, rule, command_of(group), _WINNER)


def failure_of(point: Point) -> Failure:
    """Return what is shown of a failed run."""
    lines = (point.error or "").strip().splitlines() or ["no message was recorded"]
    text = point.error or "" if len(lines) > 1 else ""
    return Failure(point.label, point.key, lines[0], lines[-1], text, point.log)


def _identity(sweep: Sweep, groups: Sequence[Group]) -> list[tuple[str, str]]:
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


def _curve_note(groups: Sequence[Group]) -> str:
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
    rect = svg.element("rect", x=0, y=0, width=width, height=16, rx=1)
    return svg.element(
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
            Cell(one.stage),
            Cell(one.key, kind="key"),
            Cell(str(one.users), float(one.users)),
            Cell(duration(one.seconds), one.seconds),
        ]
        for one in works
    ]
    return Table(heads, rows) if rows else None


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()
