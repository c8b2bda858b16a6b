"""Bootstrap of statistics that depend on sums over rows alone, such as shares and kappas.

Rows that are equal are drawn together by their number, so thousands of rows of a few kinds cost as
much as the few kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.evaluation.statistics import LEVEL, RESAMPLES, Estimate

Floats = NDArray[np.float64]


def estimate_total(
    columns: ArrayLike,
    statistic: Callable[[Floats], Floats],
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return a statistic with its percentile bootstrap interval over rows.

    Args:
        columns: [N, K] values, one row an item.
        statistic: maps sums over rows [R, K] to values [R]; NaN where there is none.
        seed: of the resampling.
        level: of confidence.
        resamples: number of resamples; those without a value are left out.

    Returns:
        The estimate; infinite ends for fewer than two rows, NaN where there is no value.
    """
    rows = np.asarray(columns, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = float(statistic(rows.sum(axis=0)[None])[0])
        if len(rows) < 2:
            return Estimate(found, -math.inf, math.inf)
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        generator = np.random.default_rng(seed)
        draws = generator.multinomial(len(rows), counts / len(rows), size=resamples)
        values = statistic(draws @ kinds)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Estimate(found, -math.inf, math.inf)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(found, float(low), float(high))
