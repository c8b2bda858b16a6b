"""Statistics of paired comparisons: outcomes, exact tests, bootstrap intervals, calibration.

N prompts, each answered by model `a` (the baseline) and model `b`; every difference is b minus a.
Prompts are the unit of resampling: repetitions of an evaluation differ in the prompts drawn, and
both answers to one prompt stay together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.algo.preference import TIE_BAND

LEVEL = 0.95
RESAMPLES = 10_000
# Elements of one block of resampled rows: bounds the memory at 8 bytes each, whatever N is.
_BLOCK = 2_000_000
CALIBRATION_BINS = 5
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval; infinite ends if the data do not determine it."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class WinCounts:
    """How often b won, tied and lost against a."""

    wins: int
    ties: int
    losses: int

    @property
    def total(self) -> int:
        """Comparisons made."""
        return self.wins + self.ties + self.losses

    @property
    def decided(self) -> int:
        """Comparisons that were no tie."""
        return self.wins + self.losses

    @property
    def win_rate(self) -> float:
        """Share of wins among decided comparisons; NaN where none was decided."""
        return self.wins / self.decided if self.decided else math.nan

    @property
    def ties_as_half(self) -> float:
        """Share of wins with a tie counted as half of one; NaN without comparisons."""
        return (self.wins + 0.5 * self.ties) / self.total if self.total else math.nan


def outcome_signs(
    score_a: ArrayLike, score_b: ArrayLike, tie_band: tuple[float, float] = TIE_BAND
) -> NDArray[np.int64]:
    """Decide each comparison by the probability that b is preferred, sigmoid(b - a).

    The probability is Bradley and Terry's (1952), which the reward model's pairwise loss fits.

    Args:
        score_a: [N] rewards of the baseline's answers.
        score_b: [N] rewards of the other model's answers.
        tie_band: probabilities from the first to the second, both included, are ties.

    Returns:
        [N]: 1 where b wins, 0 for a tie, -1 where b loses.

    Raises:
        ValueError: unequal lengths, or a score that is not finite.
    """
    a, b = paired(score_a, score_b)
    probability = scipy.special.expit(b - a)
    return np.where(probability > tie_band[1], 1, np.where(probability < tie_band[0], -1, 0))


def outcomes(
    score_a: ArrayLike, score_b: ArrayLike, tie_band: tuple[float, float] = TIE_BAND
) -> WinCounts:
    """Count wins, ties and losses of b; see `outcome_signs` for the rule."""
    return count_outcomes(outcome_signs(score_a, score_b, tie_band))


def count_outcomes(signs: NDArray[np.int64]) -> WinCounts:
    """Count the signs [N] that `outcome_signs` gives."""
    return WinCounts(int((signs > 0).sum()), int((signs == 0).sum()), int((signs < 0).sum()))


def sign_test(wins: int, losses: int) -> float:
    """Return the p-value of the exact two-sided sign test, ties left out; 1 if all are ties."""
    if wins + losses == 0:
        return 1.0
    return float(scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue)


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of a proportion, k of n (Clopper and Pearson, 1934); [0, 1] where n is 0."""
    tail = (1.0 - level) / 2.0  # not by scipy.stats, which takes half a second to import
    low = scipy.special.betaincinv(k, n - k + 1, tail) if k else 0.0
    high = scipy.special.betaincinv(k + 1, n - k, 1.0 - tail) if k < n else 1.0
    return Interval(float(low), float(high))


def estimate_mean(values: ArrayLike, seed: int, level: float = LEVEL) -> Estimate:
    """Mean of `values` [N], N at least 1, with its bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    interval = bootstrap_mean(array, seed, level)
    return Estimate(float(array.mean()), interval.low, interval.high)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int, level: float = LEVEL) -> Estimate:
    """Mean of b - a over prompts, with its bootstrap interval.

    Args:
        a: [N] values of the baseline, N at least 1.
        b: [N] values of the other model, on the same prompts.
        seed: seed of the resampling.
        level: confidence level.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    left, right = paired(a, b)
    return estimate_mean(right - left, seed, level)


def standardised_difference(
    a: ArrayLike, b: ArrayLike, seed: int, level: float = LEVEL
) -> Estimate | None:
    """Mean of b - a in units of the baseline's standard deviation (Glass's delta).

    The interval resamples prompts and recomputes both the difference and the deviation.

    Args:
        a: [N] values of the baseline.
        b: [N] values of the other model, on the same prompts.
        seed: seed of the resampling.
        level: confidence level.

    Returns:
        The estimate; `None` where the baseline does not vary.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    left, right = paired(a, b)
    if len(left) < 2 or np.ptp(left) == 0:
        return None

    def ratio(rows: Floats) -> Floats:
        gains: Floats = (rows[..., 1] - rows[..., 0]).mean(axis=-1)
        spread: Floats = rows[..., 0].std(axis=-1, ddof=1)
        return gains / spread

    columns = np.stack([left, right], axis=1)
    interval = bootstrap(columns, ratio, seed, level)
    return Estimate(float(ratio(columns[None])[0]), interval.low, interval.high)


def estimate_from_sums(
    columns: ArrayLike,
    statistic: Callable[[Floats], Floats],
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return a statistic of sums over rows, such as a share, with its bootstrap interval.

    Equal rows are drawn together by their number, so thousands of rows of a few kinds cost as much
    as the few kinds.

    Args:
        columns: [N, K] values, one row an item.
        statistic: maps sums over rows [R, K] to values [R]; NaN where there is none.
        seed: seed of the resampling.
        level: confidence level.
        resamples: number of resamples; those without a value are left out.

    Returns:
        The estimate; infinite ends for fewer than two rows, NaN where there is no value.
    """
    rows = np.asarray(columns, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(rows.sum(axis=0)[None])[0])
        if len(rows) < 2:
            return Estimate(value, -math.inf, math.inf)
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        generator = np.random.default_rng(seed)
        draws = generator.multinomial(len(rows), counts / len(rows), size=resamples)
        values = statistic(draws @ kinds)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Estimate(value, -math.inf, math.inf)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def bootstrap_mean(values: ArrayLike, seed: int, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [N]."""
    return bootstrap(
        np.asarray(values, dtype=np.float64)[:, None],
        lambda rows: rows[..., 0].mean(axis=1),
        seed,
        level,
    )


def bootstrap(
    columns: ArrayLike,
    statistic: Callable[[Floats], Floats],
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap of a statistic over rows.

    Args:
        columns: [N, K] values, one row a prompt; rows are drawn whole.
        statistic: maps resampled rows [R, N, K] to the statistic of each resample [R].
        seed: seed of the resampling; one seed and N draw the same rows, whatever the values.
        level: confidence level.
        resamples: number of resamples.

    Returns:
        The interval; infinite for fewer than two rows. Resamples whose statistic is not finite (a
        spread of zero) are left out.
    """
    rows = np.asarray(columns, dtype=np.float64)
    count = len(rows)
    if count < 2:
        return Interval(-math.inf, math.inf)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows.size)
    blocks = []
    for start in range(0, resamples, block):
        draws = generator.integers(0, count, size=(min(block, resamples - start), count))
        with np.errstate(divide="ignore", invalid="ignore"):
            blocks.append(statistic(rows[draws]))
    values = np.concatenate(blocks)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(-math.inf, math.inf)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Return both as finite float arrays [N].

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(
            f"paired values need one length: got shapes {left.shape} and {right.shape}"
        )
    for name, values in (("first", left), ("second", right)):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"the {name} values must be finite: row {row} is {values[row]}")
    return left, right


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of like confidence: mean predicted probability, share right, number."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """A calibration curve and its expected calibration error (Guo et al. 2017, eq. 5)."""

    bins: tuple[CalibrationBin, ...]
    error: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"bins": [asdict(item) for item in self.bins], "error": self.error}


def calibration(margins: ArrayLike, bins: int = CALIBRATION_BINS) -> Calibration:
    """Return the calibration of a reward model's confidence on N pairs.

    The predicted probability that the preferred side wins is sigmoid(margin) (Bradley and Terry
    1952). Each pair is read in the direction the model favours, so that a probability runs from 0.5
    to 1 and is compared with the share of pairs in which the model was right (Guo et al. 2017).

    Args:
        margins: [N] score of the preferred side minus that of the other.
        bins: Equal parts of the range from 0.5 to 1; empty ones are left out.
    """
    values = np.asarray(margins, dtype=np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(values)))
    right = np.where(values == 0.0, 0.5, (values > 0.0).astype(np.float64))
    number = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(int), bins - 1)
    filled = []
    for index in range(bins):
        inside = number == index
        if inside.any():
            count = int(inside.sum())
            predicted, observed = float(confidence[inside].mean()), float(right[inside].mean())
            filled.append(CalibrationBin(predicted, observed, count))
    error = sum(item.count * abs(item.predicted - item.observed) for item in filled)
    return Calibration(tuple(filled), error / len(values))
