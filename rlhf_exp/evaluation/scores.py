"""Scores of answers of several kinds: how they spread, and how they go with another quantity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike

from rlhf_exp.evaluation.statistics import paired

HISTOGRAM_BINS = 16
LENGTH_BINS = 8


def correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Pearson's correlation of two arrays [N]; `None` where either does not vary."""
    left, right = paired(x, y)
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(scipy.stats.pearsonr(left, right).statistic)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's correlation of two arrays [N]; `None` where either does not vary."""
    left, right = paired(x, y)
    return correlation(scipy.stats.rankdata(left), scipy.stats.rankdata(right))


def auc(above: ArrayLike, below: ArrayLike) -> float:
    """Return the probability that one of `above` [N] beats one of `below` [M], ties as half.

    The area under the ROC curve, by Mann and Whitney's U.
    """
    high, low = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    u = scipy.stats.mannwhitneyu(high, low, method="asymptotic").statistic
    return float(u) / (len(high) * len(low))


@dataclass(frozen=True)
class Distribution:
    """The scores of one kind of answers.

    Attributes:
        name: what they are.
        count: how many.
        mean: of the scores.
        std: their standard deviation.
        shares: share of the scores in each bin of the common histogram.
    """

    name: str
    count: int
    mean: float
    std: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Distributions:
    """Scores of several kinds of answers over common bins, `edges` [B + 1]."""

    edges: tuple[float, ...]
    kinds: tuple[Distribution, ...]


def distributions(scores: Mapping[str, ArrayLike], bins: int = HISTOGRAM_BINS) -> Distributions:
    """Return histograms over common bins of equal width, from the lowest score to the highest.

    Args:
        scores: by kind, each at least one.
        bins: number of bins.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins)
    kinds = []
    for name, values in arrays.items():
        shares = np.histogram(values, edges)[0] / len(values)
        mean, std = float(values.mean()), float(values.std())
        kinds.append(Distribution(name, len(values), mean, std, tuple(shares.tolist())))
    return Distributions(tuple(edges.tolist()), tuple(kinds))


@dataclass(frozen=True)
class LengthBin:
    """Answers of like length: mean tokens, mean score and its standard error, number."""

    tokens: float
    score: float
    error: float
    count: int


def by_length(scores: ArrayLike, tokens: ArrayLike, bins: int = LENGTH_BINS) -> list[LengthBin]:
    """Return mean scores by length, in bins of about equal numbers of answers.

    Answers of one length are in one bin, so bins may be fewer and of unequal numbers.

    Args:
        scores: [N], N at least 1.
        tokens: [N].
        bins: at most so many.
    """
    values, lengths = paired(scores, tokens)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1]))
    numbers = np.searchsorted(edges, lengths, side="left")
    found = []
    for number in np.unique(numbers):
        inside = numbers == number
        count = int(inside.sum())
        error = float(values[inside].std(ddof=1)) / count**0.5 if count > 1 else 0.0
        mean = float(lengths[inside].mean())
        found.append(LengthBin(mean, float(values[inside].mean()), error, count))
    return found
