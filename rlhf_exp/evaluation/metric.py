"""One number of a comparison, for both models and for their difference, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from rlhf_exp.evaluation.statistics import LEVEL, Estimate, estimate_mean, paired_difference

Better = Literal["higher", "lower", "neither"]
Verdict = Literal["better", "worse", "unclear", ""]


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
    def verdict(self) -> Verdict:
        """Whether b is better or worse; unclear while the difference's interval holds zero."""
        if self.better == "neither" or self.difference is None:
            return ""
        if not self.difference.excludes_zero:
            return "unclear"
        return "better" if (self.difference.mean > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class TableRow:
    """A metric in words: `mean [low, high]` for each model and for the difference, or a dash."""

    label: str
    a: str
    b: str
    difference: str
    verdict: Verdict


DASH = "–"
MINUS = "\N{MINUS SIGN}"


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
    """Write `mean [low, high]`; without the interval where the data give none.

    Args:
        estimate: what to write; `None` becomes a dash.
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
