"""Runs that differ in their seeds alone, taken together: means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_exp.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Floats,
    Interval,
    estimate_mean,
)
from rlhf_exp.report.sweep.data import Point, label_of
from rlhf_exp.report.sweep.settings import order_of

# Resampling two values says nothing that the two do not.
FEWEST = 3


@dataclass(frozen=True)
class Summary:
    """A number over seeds.

    Attributes:
        values: One of each seed.
        estimate: Mean and interval; the interval is infinite for fewer than `FEWEST` seeds.
    """

    values: tuple[float, ...]
    estimate: Estimate

    @property
    def has_interval(self) -> bool:
        """Whether the seeds suffice for an interval."""
        return math.isfinite(self.estimate.low) and math.isfinite(self.estimate.high)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; without an interval its ends are null."""
        low, high = (self.estimate.low, self.estimate.high) if self.has_interval else (None, None)
        values = list(self.values)
        return {
            "n": len(values),
            "mean": self.estimate.mean,
            "low": low,
            "high": high,
            "values": values,
        }


@dataclass(frozen=True)
class Group:
    """Runs of the same settings."""

    settings: Mapping[str, str]
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The settings in words."""
        return label_of(self.settings) or "all runs"

    @property
    def done(self) -> tuple[Point, ...]:
        """The runs whose numbers are final."""
        return tuple(point for point in self.points if point.done)

    def objective(self) -> Summary | None:
        """Return the objective over seeds."""
        return summarised(point.objective for point in self.done)

    def metric(self, name: str) -> Summary | None:
        """Return a final metric over seeds."""
        return summarised(point.metrics.get(name) for point in self.done)


def grouped(points: Sequence[Point]) -> list[Group]:
    """Return the groups, ordered by their settings, numbers by size."""
    found: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        found.setdefault(tuple(point.settings.values()), []).append(point)
    groups = [Group(members[0].settings, tuple(members)) for members in found.values()]
    return sorted(groups, key=lambda one: tuple(order_of(text) for text in one.settings.values()))


def summarised(values: Iterable[float | None]) -> Summary | None:
    """Return mean and percentile-bootstrap interval of what is finite; `None` of nothing."""
    known = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    if len(known) < FEWEST:
        return Summary(known, Estimate(sum(known) / len(known), -math.inf, math.inf))
    return Summary(known, estimate_mean(known, seed=0))


def intervals(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean and percentile-bootstrap interval over seeds at each of T steps.

    Args:
        values: [n, T], one row a seed; NaN where a seed has no value.

    Returns:
        (mean, low, high), each [T]; low and high are NaN where fewer than `FEWEST` seeds have one.
    """
    known = np.isfinite(values)
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, values, 0).sum(axis=0) / np.where(count, count, np.nan)
    low, high = np.full(len(mean), np.nan), np.full(len(mean), np.nan)
    for members in {tuple(column) for column in known.T.tolist()}:
        rows = np.flatnonzero(members)
        if len(rows) < FEWEST:
            continue
        steps = np.flatnonzero((np.array(members) == known.T).all(axis=1))
        draws = np.random.default_rng(0).integers(0, len(rows), size=(RESAMPLES, len(rows)))
        weights = np.apply_along_axis(np.bincount, 1, draws, minlength=len(rows)) / len(rows)
        means = weights @ values[np.ix_(rows, steps)]
        tail = (1 - LEVEL) / 2
        low[steps], high[steps] = np.quantile(means, [tail, 1 - tail], axis=0)
    return mean, low, high


def difference(a: Summary, b: Summary, seed: int = 0) -> Estimate:
    """Return the difference of means, b - a, with its interval over seeds.

    The seeds of both sides are resampled independently of each other. The interval is infinite
    where a side has fewer than `FEWEST`.
    """
    left, right = np.array(a.values), np.array(b.values)
    found = float(right.mean() - left.mean())
    if min(len(left), len(right)) < FEWEST:
        return Estimate(found, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    means = [
        side[generator.integers(0, len(side), size=(RESAMPLES, len(side)))].mean(axis=1)
        for side in (left, right)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means[1] - means[0], [tail, 1 - tail])
    ends = Interval(float(low), float(high))
    return Estimate(found, ends.low, ends.high)


def best_of(groups: Sequence[Group]) -> list[tuple[Group, Summary]]:
    """Return the groups by their mean objective, the best first.

    A group whose seeds have mostly failed is left out: it needs half as many as the fullest.
    """
    known = [(group, found) for group in groups if (found := group.objective()) is not None]
    most = max((len(found.values) for _, found in known), default=0)
    enough = [(group, found) for group, found in known if 2 * len(found.values) >= most]
    return sorted(enough, key=lambda pair: -pair[1].estimate.mean)
