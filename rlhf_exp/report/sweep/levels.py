"""Which hyperparameter gives the lines of a chart their colour, and which value which colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_exp.report.numbers import short
from rlhf_exp.report.sweep.data import Point, short_key
from rlhf_exp.report.sweep.settings import order_of


@dataclass(frozen=True)
class Levels:
    """The values of a hyperparameter, few enough to tell apart.

    Attributes:
        key: The hyperparameter; empty where there is none.
        labels: Of the levels, in order.
        numbers: For each point the number of its level.
    """

    key: str
    labels: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """The hyperparameter's short name."""
        return short_key(self.key)


def levels_of(points: Sequence[Point], key: str, most: int) -> Levels:
    """Return the levels of a hyperparameter, at most `most`.

    More numbers than that are put into ranges with about as many points each; of more words the
    most frequent keep a level of their own.
    """
    values = [point.settings[key] for point in points]
    distinct = sorted(set(values), key=order_of)
    if len(distinct) <= most:
        return Levels(key, tuple(distinct), tuple(map(distinct.index, values)))
    if all(order_of(value)[0] == 0 and math.isfinite(float(value)) for value in distinct):
        return _ranges(key, [float(value) for value in values], min(most, 4))
    common = sorted(distinct, key=lambda one: -values.count(one))[: most - 1]
    labels = (*(one for one in distinct if one in common), "other")
    found = tuple(labels.index(one) if one in common else len(labels) - 1 for one in values)
    return Levels(key, labels, found)


def leading(points: Sequence[Point], varied: Sequence[str], most: int) -> list[Levels]:
    """Return the levels of each hyperparameter, the one that separates objectives most first."""
    found = [levels_of(points, key, most) for key in varied]
    objectives = [math.nan if one.objective is None else one.objective for one in points]
    return sorted(found, key=lambda one: -explained(one.numbers, objectives))


def explained(numbers: Sequence[int], values: Sequence[float]) -> float:
    """Return the share of the variance of values that lies between levels (eta squared)."""
    level, value = np.array(numbers), np.array(values, dtype=np.float64)
    known = np.isfinite(value)
    level, value = level[known], value[known]
    total = float(((value - value.mean()) ** 2).sum()) if len(value) else 0.0
    if total == 0:
        return 0.0
    parts = [value[level == one] for one in np.unique(level)]
    between = sum(len(part) * (part.mean() - value.mean()) ** 2 for part in parts)
    return float(between / total)


def _ranges(key: str, values: Sequence[float], count: int) -> Levels:
    numbers = np.array(values)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    placed = np.searchsorted(edges, numbers, side="left")
    used = np.unique(placed)
    labels = []
    for level in used:
        inside = numbers[placed == level]
        low, high = short(float(inside.min())), short(float(inside.max()))
        labels.append(low if low == high else f"{low} to {high}")
    return Levels(key, tuple(labels), tuple(np.searchsorted(used, placed).tolist()))
