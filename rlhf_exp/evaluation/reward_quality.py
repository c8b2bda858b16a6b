"""The quality of a reward model, from its scores of held-out pairs of answers.

Legend: N pairs, each a chosen and a rejected answer to one prompt. A margin is the chosen answer's
score minus the rejected one's. The model is right where the margin is above zero; equal scores are
wrong. Training and the models themselves are left out: arrays in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike
from scipy import special

from rlhf_exp.evaluation.statistics import (
    Calibration,
    Interval,
    calibration,
    clopper_pearson,
    paired,
)

MARGIN_BINS = 5
HISTOGRAM_BINS = 16
LENGTH_BINS = 8


@dataclass(frozen=True)
class Proportion:
    """`count` of `total`, with its exact (Clopper-Pearson) 95 % interval."""

    count: int
    total: int
    interval: Interval

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.count / self.total if self.total else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Proportion:
        """Undo `to_json`."""
        return cls(plain["count"], plain["total"], Interval(**plain["interval"]))


def proportion_of(flags: ArrayLike) -> Proportion:
    """Return how many of the flags [N] are set."""
    values = np.asarray(flags, dtype=bool)
    count = int(values.sum())
    return Proportion(count, len(values), clopper_pearson(count, len(values)))


@dataclass(frozen=True)
class PairQuality:
    """A judge's quality on held-out pairs.

    Attributes:
        judge: its name.
        accuracy: pairs in which it prefers the chosen answer.
        auc: probability that a chosen answer of any pair beats a rejected one of any pair.
        margin: mean margin.
        margin_bins: accuracy by |margin|.
        calibration: by the probability that it claims.
        length: the relation of its scores to length.
        chosen_over_blank: prompts whose chosen answer beats saying nothing.
        rejected_over_blank: prompts whose rejected answer beats saying nothing.
    """

    judge: str
    accuracy: Proportion
    auc: float
    margin: float
    margin_bins: tuple[MarginBin, ...]
    calibration: Calibration
    length: LengthReport
    chosen_over_blank: Proportion
    rejected_over_blank: Proportion

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self)
        plain["length"]["controlled_accuracy"] = self.length.controlled_accuracy
        return plain


def pair_quality(
    judge: str,
    chosen: ArrayLike,
    rejected: ArrayLike,
    blank: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
) -> PairQuality:
    """Return a judge's quality from its scores of N pairs.

    Args:
        judge: its name.
        chosen: [N] scores of the chosen answers.
        rejected: [N] scores of the rejected ones.
        blank: [N] scores of empty answers to the same prompts.
        chosen_tokens: [N] lengths of the chosen answers.
        rejected_tokens: [N] lengths of the rejected ones.

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    good, bad = paired(chosen, rejected)
    nothing, _ = paired(blank, rejected)
    margins = good - bad
    return PairQuality(
        judge=judge,
        accuracy=proportion_of(margins > 0),
        auc=auc(good, bad),
        margin=float(margins.mean()),
        margin_bins=tuple(accuracy_by_margin(margins)),
        calibration=calibration(margins),
        length=length_report(good, bad, chosen_tokens, rejected_tokens),
        chosen_over_blank=proportion_of(good > nothing),
        rejected_over_blank=proportion_of(bad > nothing),
    )


@dataclass(frozen=True)
class MarginBin:
    """Pairs of like |margin|.

    Attributes:
        low: smallest |margin|.
        high: largest |margin|.
        right: in how many the model prefers the chosen answer.
        expected: the accuracy that the model predicts, mean of sigmoid(|margin|).
    """

    low: float
    high: float
    right: Proportion
    expected: float


def accuracy_by_margin(margins: ArrayLike, bins: int = MARGIN_BINS) -> list[MarginBin]:
    """Return the accuracy of N pairs, in bins of equal numbers of pairs by |margin|.

    Args:
        margins: [N], N at least 1.
        bins: most bins; fewer if there are fewer pairs.
    """
    values = np.asarray(margins, dtype=np.float64)
    sizes = np.abs(values)
    order = np.argsort(sizes, kind="stable")
    margin_bins = []
    for rows in np.array_split(order, min(bins, len(values))):
        inside = sizes[rows]
        low, high = float(inside.min()), float(inside.max())
        expected = float(special.expit(inside).mean())
        margin_bins.append(MarginBin(low, high, proportion_of(values[rows] > 0), expected))
    return margin_bins


@dataclass(frozen=True)
class LengthReport:
    """The relation of scores to the answers' lengths in tokens.

    Attributes:
        pearson: Pearson's correlation of score and length over all answers; `None` if either does
            not vary.
        spearman: the same of their ranks.
        within: Pearson's correlation after subtracting each pair's mean from both, so that
            differences between prompts do not count; `None` if nothing varies within pairs.
        model_longer: pairs of different lengths in which the model prefers the longer answer.
        label_longer: pairs of different lengths in which people chose the longer one, which is
            also the accuracy of a judge that looks at nothing but length.
        right_longer: pairs whose chosen answer is the longer one, in which the model is right.
        right_shorter: pairs whose chosen answer is the shorter one, in which the model is right.
    """

    pearson: float | None
    spearman: float | None
    within: float | None
    model_longer: Proportion
    label_longer: Proportion
    right_longer: Proportion
    right_shorter: Proportion

    @property
    def controlled_accuracy(self) -> float | None:
        """Accuracy if the chosen answer were the longer one in half of the pairs.

        Length alone can then not tell chosen from rejected. `None` if either kind has no pair.
        """
        if not self.right_longer.total or not self.right_shorter.total:
            return None
        return (self.right_longer.value + self.right_shorter.value) / 2


def length_report(
    chosen: ArrayLike, rejected: ArrayLike, chosen_tokens: ArrayLike, rejected_tokens: ArrayLike
) -> LengthReport:
    """Return the relation of the scores [N] of both sides to their numbers of tokens [N].

    Raises:
        ValueError: unequal lengths, or a value that is not finite.
    """
    good, bad = paired(chosen, rejected)
    good_tokens, bad_tokens = paired(chosen_tokens, rejected_tokens)
    margins, longer = good - bad, good_tokens - bad_tokens
    scores = np.concatenate([good, bad])
    tokens = np.concatenate([good_tokens, bad_tokens])
    differ = longer != 0
    return LengthReport(
        pearson=correlation(scores, tokens),
        spearman=rank_correlation(scores, tokens),
        within=correlation(np.concatenate([margins, -margins]), np.concatenate([longer, -longer])),
        model_longer=proportion_of((margins * longer)[differ] > 0),
        label_longer=proportion_of(longer[differ] > 0),
        right_longer=proportion_of(margins[longer > 0] > 0),
        right_shorter=proportion_of(margins[longer < 0] > 0),
    )


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
        name: the kind of answers.
        count: number of answers.
        mean: mean score.
        std: standard deviation of the scores.
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


def scores_by_length(
    scores: ArrayLike, tokens: ArrayLike, bins: int = LENGTH_BINS
) -> list[LengthBin]:
    """Return mean scores by length, in bins of about equal numbers of answers.

    Answers of one length are in one bin, so bins may be fewer and of unequal numbers.

    Args:
        scores: [N], N at least 1.
        tokens: [N].
        bins: most bins.
    """
    values, lengths = paired(scores, tokens)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1]))
    numbers = np.searchsorted(edges, lengths, side="left")
    length_bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        count = int(inside.sum())
        error = float(values[inside].std(ddof=1)) / count**0.5 if count > 1 else 0.0
        mean = float(lengths[inside].mean())
        length_bins.append(LengthBin(mean, float(values[inside].mean()), error, count))
    return length_bins
