"""From rows of logged metrics to points of a curve: selection, smoothing, thinning.

A curve is two arrays of one length, x and y. NaN in y is a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Row = Mapping[str, float]

STEP = "global_step"
SMOOTH_ABOVE = 60
_WINDOWS = 25
_MOST_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """Points of one metric: `x` [N] steps, ascending, and `y` [N] values."""

    x: Floats
    y: Floats


def curve(rows: Iterable[Row], names: Sequence[str]) -> Curve | None:
    """Return the points of the first of `names` that any row has; `None` if none has it.

    A step logged twice counts with its last value.
    """
    rows = list(rows)
    for name in names:
        points = {
            float(row[STEP]): _number(row[name]) for row in rows if STEP in row and name in row
        }
        if points and not all(np.isnan(value) for value in points.values()):
            steps = sorted(points)
            return Curve(np.array(steps), np.array([points[step] for step in steps]))
    return None


def joint(left: Curve, right: Curve) -> tuple[Floats, Floats, Floats]:
    """Return (steps [N], left y [N], right y [N]) at the steps that both have, gaps left out."""
    shared, in_left, in_right = np.intersect1d(left.x, right.x, return_indices=True)
    a, b = left.y[in_left], right.y[in_right]
    known = np.isfinite(a) & np.isfinite(b)
    return shared[known], a[known], b[known]


def window_of(count: int) -> int:
    """Return the width of the running mean for `count` points: 1 where they are few."""
    return 1 if count <= SMOOTH_ABOVE else 2 * (count // _WINDOWS // 2) + 1


def running_mean(y: Floats, window: int) -> Floats:
    """Return the mean over `window` points around each [N]; fewer at the ends; gaps left out."""
    if window <= 1:
        return y
    known = np.isfinite(y)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def thinned(x: Floats, y: Floats, most: int = _MOST_POINTS) -> tuple[Floats, Floats]:
    """Return at most `most` points, every bucket's lowest and highest: no spike is lost."""
    if len(x) <= most:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), max(1, most // 2 - 1)):
        known = bucket[np.isfinite(y[bucket])]
        if len(known):
            keep |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
        else:
            keep.add(int(bucket[0]))
    index = np.array(sorted(keep))
    return x[index], y[index]


def _number(value: object) -> float:
    """Return a finite number, or NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return float("nan")
    number = float(value)
    return number if np.isfinite(number) else float("nan")
