"""The charts of several runs: reward against KL, and learning curves over seeds.

Colour is the hyperparameter that separates the objectives most, dashes are the next one, so that a
legend stays short however many lines there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_exp.report.chart import Chart, Floats, LineSeries, curve, short
from rlhf_exp.report.sweep.data import (
    RunGroup,
    RunPoint,
    Sweep,
    group_runs,
    intervals,
    short_key,
)
from rlhf_exp.report.sweep.gather import evaluations
from rlhf_exp.report.sweep.settings import sort_key

COLOURS, DASHES = 6, 4
# More bands than this in one chart hide each other.
BANDS = 6
CURVES = {
    "ppo": (
        ("Validation reward", "eval/reward_mean"),
        ("KL on validation prompts, nats per answer", "eval/kl_sequence"),
        ("Answer length, tokens", "eval/length_mean"),
    ),
    "dpo": (
        ("Accuracy on validation pairs", "eval/accuracy"),
        ("KL on validation prompts, nats per answer", "eval/kl_sequence"),
        ("Validation loss of a pair", "eval/loss"),
    ),
    "reward": (
        ("Accuracy on validation pairs", "eval/accuracy"),
        ("Validation loss, nats per pair", "eval/loss"),
    ),
    "sft": (("Validation loss, nats per token", "eval/loss"),),
}


class Palette:
    """Colours and dashes of a sweep's lines."""

    def __init__(self, sweep: Sweep) -> None:
        # A run that drew no line must not take a colour.
        points = [point for point in sweep.points if point.rows] or list(sweep.points)
        ranked = rank_hyperparameters(points, sweep.varied, COLOURS)
        none = HyperparameterLevels("", ("runs",), (0,) * len(points))
        self.colour = ranked[0] if ranked else none
        second = ranked[1] if len(ranked) > 1 else None
        too_many = second is not None and len(second.labels) > DASHES
        if second is not None and too_many:
            second = rank_hyperparameters(points, [second.key], DASHES)[0]
        self.dash = second or none
        self.numbers = {point.key: number for number, point in enumerate(points)}

    def of(self, point: RunPoint) -> tuple[int, int]:
        """Return the colour and the dash of a run's line; dash 0 is the colour's own: solid."""
        number = self.numbers.get(point.key, 0)  # a run without a line of its own training
        return self.colour.numbers[number], self.dash.numbers[number]

    def legend(self) -> list[tuple[str, int, int, str]]:
        """Return the legend: every colour, then every dash."""
        entries = []
        if self.colour.key:
            entries += [
                (f"{self.colour.name} {label}", number, 0, "")
                for number, label in enumerate(self.colour.labels)
            ]
        if self.dash.key:
            entries += [
                (f"{self.dash.name} {label}", COLOURS, number, "")
                for number, label in enumerate(self.dash.labels)
            ]
        return entries


def frontier(sweep: Sweep, palette: Palette) -> Chart | None:
    """Return reward against the square root of KL, one line a run, a disc at its published step."""
    lines = []
    for point in sweep.points:
        points = evaluations(point.rows)
        if not points:
            continue
        steps, reward, kl = (np.array(column) for column in zip(*points, strict=True))
        colour, dash = palette.of(point)
        last = f"{short(float(reward[-1]))}"
        line = LineSeries(
            point.label, root(kl), reward, colour, smooth=False, unit="√KL", last=last, dash=dash,
            disc=_index_of_step(steps, point.published),
        )  # fmt: skip
        lines.append(line)
    if not lines:
        return None
    levels = [] if sweep.kl_budget is None else [(math.sqrt(sweep.kl_budget), "KL budget")]
    return Chart(
        "Validation reward against √KL",
        lines,
        x_label="√KL, KL in nats per answer",
        keys=palette.legend(),
        marks_x=levels,
    )


def best_of_n_frontier(sweep: Sweep, palette: Palette) -> Chart | None:
    """Return test reward against the square root of KL: best-of-n, and every evaluated model.

    Runs with one SFT policy and one reward share a curve, which is drawn once.
    """
    curves_drawn: dict[tuple[tuple[float, float], ...], LineSeries] = {}
    models = []
    for point in sweep.points:
        best = tuple(
            (point.metrics[f"eval best_of/{n}/kl"], point.metrics[f"eval best_of/{n}/reward"])
            for n in _best_of_sizes(point)
        )
        if not best:
            continue
        if best not in curves_drawn:
            label = f"best of n, {point.label}" if curves_drawn else "best of n"
            kl, reward = (np.array(column) for column in zip(*best, strict=True))
            curves_drawn[best] = LineSeries(
                label, root(kl), reward, COLOURS, smooth=False, unit="√KL"
            )
        models += _model_points(point, palette)
    if not curves_drawn:
        return None
    return Chart(
        "Test reward against √KL",
        [*curves_drawn.values(), *models],
        x_label="√KL, KL in nats per answer",
        # A single point shows no dashes.
        keys=[
            ("best of n", COLOURS, 0, ""),
            *(entry for entry in palette.legend() if entry[1] != COLOURS),
        ],
    )


def _best_of_sizes(point: RunPoint) -> list[int]:
    """Return each n of which a run has evaluated the best, ascending."""
    found = (re.fullmatch(r"eval best_of/(\d+)/reward", name) for name in point.metrics)
    return sorted(int(match[1]) for match in found if match is not None)


def _model_points(point: RunPoint, palette: Palette) -> list[LineSeries]:
    """Return a line of one point for each model that a run's evaluation puts beside best-of-n."""
    found = (re.fullmatch(r"eval frontier/([^/]+)/kl", name) for name in point.metrics)
    names = [match[1] for match in found if match is not None]
    colour, _ = palette.of(point)
    return [
        LineSeries(
            f"{point.label}, {name}",
            root(np.array([point.metrics[f"eval frontier/{name}/kl"]])),
            np.array([point.metrics[f"eval frontier/{name}/reward"]]),
            colour,
            smooth=False,
            unit="√KL",
            disc=0,
        )
        for name in names
    ]


def root(kl: Floats) -> Floats:
    """Return the square root of KL [N]; an estimate below 0 is one of 0."""
    return np.sqrt(np.maximum(kl, 0.0))


def curves(sweep: Sweep, palette: Palette) -> list[tuple[str, list[Chart]]]:
    """Return (heading, charts): each metric over training, mean and interval over seeds.

    With more settings than can be told apart in one chart, each colour gets one of its own, with
    the same vertical axis.
    """
    groups = group_runs(sweep.points)
    headed_charts = []
    for title, metric in CURVES.get(sweep.stage, ()):
        banded = len(groups) <= BANDS
        lines = [(group, _line(group, metric, palette, banded=banded)) for group in groups]
        known = [(group, line) for group, line in lines if line is not None]
        if not known:
            continue
        if banded or not palette.dash.key:
            headed_charts.append(
                ("", [Chart(title, [line for _, line in known], keys=_keys(palette))])
            )
        else:
            headed_charts.append((title, _charts_by_colour(known, palette)))
    joined = [chart for heading, charts in headed_charts if not heading for chart in charts]
    apart = [(heading, charts) for heading, charts in headed_charts if heading]
    return ([("", joined)] if joined else []) + apart


def over_seeds(group: RunGroup, metric: str) -> tuple[Floats, Floats, Floats, Floats] | None:
    """Return (steps, mean, low, high), each [T], of a metric in the runs of a group."""
    members = group.done or group.points
    seed_curves = [
        points for seed_curve in members if (points := curve(seed_curve.rows, [metric])) is not None
    ]
    if not seed_curves:
        return None
    steps = np.unique(np.concatenate([seed_curve.x for seed_curve in seed_curves]))
    values = np.full((len(seed_curves), len(steps)), np.nan)
    for row, seed_curve in enumerate(seed_curves):
        values[row, np.searchsorted(steps, seed_curve.x)] = seed_curve.y
    return steps, *intervals(values)


def _keys(palette: Palette) -> list[tuple[str, int, int, str]] | None:
    return palette.legend() or None


def _line(group: RunGroup, metric: str, palette: Palette, *, banded: bool) -> LineSeries | None:
    statistics = over_seeds(group, metric)
    if statistics is None:
        return None
    steps, mean, low, high = statistics
    colour, dash = palette.of(group.points[0])
    band = (low, high) if banded and np.isfinite(low).any() else None
    count = len(group.done or group.points)
    label = f"{group.label}, {count} seeds" if count > 1 else group.label
    return LineSeries(
        label, steps, mean, colour, smooth=False, dash=dash, band=band, disc=len(steps) - 1
    )


def _charts_by_colour(
    lines: Sequence[tuple[RunGroup, LineSeries]], palette: Palette
) -> list[Chart]:
    """Return a chart for each colour, all with one vertical axis."""
    values = np.concatenate([line.y for _, line in lines])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    charts = []
    for number, label in enumerate(palette.colour.labels):
        own = [line for _, line in lines if line.colour == number]
        if own:
            keys = [key for key in palette.legend() if key[1] == COLOURS]
            title = f"{palette.colour.name} {label}"
            charts.append(Chart(title, own, keys=keys, y_range=(low - margin, high + margin)))
    return charts


def _index_of_step(steps: Floats, published: float | None) -> int:
    """Return the index of the published step; the last where it is not known."""
    if published is None or published not in steps:
        return len(steps) - 1
    return int(np.flatnonzero(steps == published)[0])


@dataclass(frozen=True)
class HyperparameterLevels:
    """The values of a hyperparameter, few enough to tell apart.

    Attributes:
        key: The hyperparameter; empty where there is none.
        labels: Labels of the levels, in order.
        numbers: For each point the number of its level.
    """

    key: str
    labels: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """The hyperparameter's short name."""
        return short_key(self.key)


def levels_of(points: Sequence[RunPoint], key: str, most: int) -> HyperparameterLevels:
    """Return the levels of a hyperparameter, at most `most`.

    More numbers than that are put into ranges with about as many points each; of more words the
    most frequent keep a level of their own.
    """
    values = [point.settings[key] for point in points]
    distinct = sorted(set(values), key=sort_key)
    if len(distinct) <= most:
        return HyperparameterLevels(key, tuple(distinct), tuple(map(distinct.index, values)))
    if all(sort_key(value)[0] == 0 and math.isfinite(float(value)) for value in distinct):
        return _range_levels(key, [float(value) for value in values], min(most, 4))
    common = sorted(distinct, key=lambda value: -values.count(value))[: most - 1]
    labels = (*(value for value in distinct if value in common), "other")
    numbers = tuple(labels.index(value) if value in common else len(labels) - 1 for value in values)
    return HyperparameterLevels(key, labels, numbers)


def rank_hyperparameters(
    points: Sequence[RunPoint], varied: Sequence[str], most: int
) -> list[HyperparameterLevels]:
    """Return the levels of each hyperparameter, the one that separates objectives most first."""
    candidates = [levels_of(points, key, most) for key in varied]
    objectives = [
        math.nan if candidate.objective is None else candidate.objective for candidate in points
    ]
    return sorted(
        candidates, key=lambda candidate: -explained_variance(candidate.numbers, objectives)
    )


def explained_variance(numbers: Sequence[int], values: Sequence[float]) -> float:
    """Return the share of the variance of values that lies between levels (eta squared)."""
    level, value = np.array(numbers), np.array(values, dtype=np.float64)
    known = np.isfinite(value)
    level, value = level[known], value[known]
    total = float(((value - value.mean()) ** 2).sum()) if len(value) else 0.0
    if total == 0:
        return 0.0
    parts = [value[level == number] for number in np.unique(level)]
    between = sum(len(part) * (part.mean() - value.mean()) ** 2 for part in parts)
    return float(between / total)


def _range_levels(key: str, values: Sequence[float], count: int) -> HyperparameterLevels:
    numbers = np.array(values)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    placed = np.searchsorted(edges, numbers, side="left")
    used = np.unique(placed)
    labels = []
    for level in used:
        inside = numbers[placed == level]
        low, high = short(float(inside.min())), short(float(inside.max()))
        labels.append(low if low == high else f"{low} to {high}")
    return HyperparameterLevels(key, tuple(labels), tuple(np.searchsorted(used, placed).tolist()))
