"""The summary of N judged pairs of answers, for any judge, and metrics compared between two models.

Who judged is left out. Several people's votes on a prompt become one sign and one value for it
first (`agreement.majority`, `agreement.mean_value`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike

from rlhf_exp.evaluation.statistics import (
    LEVEL,
    Estimate,
    Interval,
    WinCounts,
    clopper_pearson,
    count_outcomes,
    estimate_mean,
    paired_difference,
    sign_test,
)

POWER = 0.8
ALPHA = 0.05
# Beyond this many decided pairs an effect is called too small to plan for.
MOST_PAIRS = 20_000
MetricVerdict = Literal["better", "worse", "unclear", ""]
Better = Literal["higher", "lower", "neither"]
DASH = "–"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class PreferenceResult:
    """Model b compared with the baseline a.

    Attributes:
        outcome: prompts on which b won, tied and lost.
        p_value: p-value of the exact two-sided sign test, ties left out.
        win_rate: exact interval (Clopper-Pearson) of the share of wins among decided prompts.
        ties_as_half: share of wins with a tie as half of one, and its bootstrap interval over
            prompts; `None` without prompts.
    """

    outcome: WinCounts
    p_value: float
    win_rate: Interval
    ties_as_half: Estimate | None

    @cached_property
    def needed(self) -> int | None:
        """Decided prompts that a new comparison needs, if the win rate is the one measured.

        With so many the sign test finds it with probability `POWER` at level `ALPHA`. `None` if
        more than `MOST_PAIRS`, or nothing was decided. Computed on first use: near one half
        thousands of sums are tried.
        """
        return needed_pairs(self.outcome.win_rate) if self.outcome.decided else None

    @property
    def needed_prompts(self) -> int | None:
        """`needed`, with ties at the rate measured: prompts, decided or not."""
        if self.needed is None:
            return None
        return math.ceil(self.needed * self.outcome.total / self.outcome.decided)


def summarise_preference(
    signs: ArrayLike, values: ArrayLike | None = None, seed: int = 0, level: float = LEVEL
) -> PreferenceResult:
    """Summarise N judged prompts.

    Args:
        signs: [N]: 1 where b is preferred, 0 for a tie, -1 where a is.
        values: [N] from 0 (a preferred) to 1 (b preferred), the mean over a prompt's votes; by
            default the signs.
        seed: seed of the bootstrap.
        level: confidence level of the intervals.
    """
    decided = np.asarray(signs, dtype=np.int64)
    outcome = count_outcomes(decided)
    shares = (decided + 1) / 2 if values is None else np.asarray(values, dtype=np.float64)
    return PreferenceResult(
        outcome=outcome,
        p_value=sign_test(outcome.wins, outcome.losses),
        win_rate=clopper_pearson(outcome.wins, outcome.decided, level),
        ties_as_half=estimate_mean(shares, seed, level) if len(shares) else None,
    )


def needed_pairs(win_rate: float, power: float = POWER, alpha: float = ALPHA) -> int | None:
    """Return the smallest number of decided pairs at which the sign test has this power.

    The power of an exact test does not rise with every pair, so a few numbers above the smallest
    can lie a little below `power` again.

    Args:
        win_rate: the true probability of a win among decided pairs.
        power: the probability to find it.
        alpha: level of the test.

    Returns:
        The number; `None` if it is above `MOST_PAIRS`.
    """
    effect = abs(win_rate - 0.5)
    if effect == 0:
        return None
    # The normal approximation overestimates the exact test's power: start well below it.
    spread = scipy.stats.norm.ppf(1 - alpha / 2) * 0.5
    spread += scipy.stats.norm.ppf(power) * math.sqrt(win_rate * (1 - win_rate))
    start = int(0.8 * (spread / effect) ** 2)
    if start > MOST_PAIRS:
        return None
    for count in range(max(1, start), MOST_PAIRS + 1):
        if sign_test_power(count, win_rate, alpha) >= power:
            return count
    return None


def sign_test_power(count: int, win_rate: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact two-sided sign test rejects.

    Args:
        count: decided pairs.
        win_rate: the true probability of a win among them.
        alpha: level of the test.
    """
    # Largest number of losses (or wins) that is rejected; the fair coin makes both tails equal.
    edge = int(scipy.stats.binom.ppf(alpha / 2, count, 0.5))
    if scipy.stats.binom.cdf(edge, count, 0.5) > alpha / 2:
        edge -= 1
    if edge < 0:
        return 0.0
    low = scipy.stats.binom.cdf(edge, count, win_rate)
    high = scipy.stats.binom.sf(count - edge - 1, count, win_rate)
    return float(low + high)


@dataclass(frozen=True)
class Metric:
    """A mean over prompts.

    Attributes:
        key: short name, for logs.
        label: name with its unit, for readers.
        better: which direction is an improvement.
        a: the baseline's mean; `None` where the metric has no meaning for it.
        b: the other model's mean.
        difference: the mean of b - a over prompts.
    """

    key: str
    label: str
    better: Better
    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None

    @property
    def verdict(self) -> MetricVerdict:
        """Whether b is better or worse; unclear while the difference's interval holds zero."""
        if self.better == "neither" or self.difference is None:
            return ""
        if not self.difference.excludes_zero:
            return "unclear"
        return "better" if (self.difference.mean > 0) == (self.better == "higher") else "worse"


def paired_metric(
    key: str,
    label: str,
    better: Better,
    a: ArrayLike,
    b: ArrayLike,
    seed: int,
    level: float = LEVEL,
) -> Metric:
    """Summarise values [N] of both models on the same N prompts.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    difference = paired_difference(a, b, seed, level)
    return Metric(
        key, label, better, estimate_mean(a, seed, level), estimate_mean(b, seed, level), difference
    )


def single_metric(
    key: str, label: str, better: Better, b: ArrayLike, seed: int, level: float = LEVEL
) -> Metric:
    """Summarise values [N] that only b has."""
    return Metric(key, label, better, None, estimate_mean(b, seed, level), None)


@dataclass(frozen=True)
class TableRow:
    """A metric in words: `mean [low, high]` for each model and for the difference, or a dash."""

    label: str
    a: str
    b: str
    difference: str
    verdict: MetricVerdict


def table_row(metric: Metric) -> TableRow:
    """Write a metric with the same number of decimals in all its columns."""
    decimals = _decimals([part for part in (metric.a, metric.b, metric.difference) if part])
    return TableRow(
        label=metric.label,
        a=format_estimate(metric.a, decimals),
        b=format_estimate(metric.b, decimals),
        difference=format_estimate(metric.difference, decimals, signed=True),
        verdict=metric.verdict,
    )


def format_estimate(
    estimate: Estimate | None, decimals: int | None = None, signed: bool = False
) -> str:
    """Write `mean [low, high]`; without the interval if the data give none.

    Args:
        estimate: the estimate; `None` becomes a dash.
        decimals: digits after the point; by default three significant digits.
        signed: write a plus before a positive mean.
    """
    if estimate is None or not math.isfinite(estimate.mean):
        return DASH
    places = _decimals([estimate]) if decimals is None else decimals
    mean = _number(estimate.mean, places, signed)
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return mean
    low, high = (_number(end, places, signed) for end in (estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def estimate_to_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    """Return plain values; ends that are not finite become `None`, because JSON has no infinity."""
    if estimate is None:
        return None
    values = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def estimate_from_json(value: Mapping[str, Any] | None) -> Estimate | None:
    """Undo `estimate_to_json`."""
    if value is None:
        return None
    mean, low, high = value["mean"], value["low"], value["high"]
    return Estimate(
        math.nan if mean is None else mean,
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )


def _decimals(estimates: list[Estimate]) -> int:
    """Return the decimals that give the largest number three significant digits, at most 3."""
    numbers = [abs(value) for e in estimates for value in (e.mean, e.low, e.high)]
    largest = max((value for value in numbers if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 2
    return int(np.clip(2 - math.floor(math.log10(largest)), 0, 3 if largest >= 0.01 else 5))


def _number(value: float, decimals: int, signed: bool) -> str:
    rounded = round(value, decimals) + 0.0  # turns -0.0 into 0.0
    sign = "+" if signed and rounded > 0 else ""
    return f"{sign}{rounded:.{decimals}f}".replace("-", MINUS)
