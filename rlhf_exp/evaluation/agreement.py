"""Agreement of several annotators, and their bias towards a side of the screen.

Legend: N items, R annotators. A table of ratings is [N, R]: 1 where b is preferred, 0 for a tie, -1
where a is, NaN where the annotator did not judge the item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.evaluation.statistics import Interval, clopper_pearson, sign_test

Floats = NDArray[np.float64]
Measurement = Literal["nominal", "ordinal"]
CHOICES = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class PairAgreement:
    """How often two annotators agree.

    Attributes:
        first: column of one annotator.
        second: column of the other.
        equal: items on which both gave the same judgment.
        both: items that both judged.
    """

    first: int
    second: int
    equal: int
    both: int

    @property
    def share(self) -> float:
        """Share of equal judgments; NaN where there is no common item."""
        return self.equal / self.both if self.both else math.nan


@dataclass(frozen=True)
class SideBias:
    """Choices of the first side shown (left, or above), among decided votes.

    Attributes:
        first: votes for the first side.
        second: votes for the second.
        p_value: p-value of the exact test that both are equally likely.
        interval: exact interval of the first side's share.
    """

    first: int
    second: int
    p_value: float
    interval: Interval

    @property
    def share(self) -> float:
        """Share of the first side; NaN without decided votes."""
        total = self.first + self.second
        return self.first / total if total else math.nan


def pairwise_agreement(ratings: ArrayLike) -> list[PairAgreement]:
    """Compare every two columns of `ratings` [N, R] on the items that both judged."""
    table = _table(ratings)
    agreements = []
    for first, second in combinations(range(table.shape[1]), 2):
        left, right = table[:, first], table[:, second]
        both = ~(np.isnan(left) | np.isnan(right))
        equal = int((left[both] == right[both]).sum())
        agreements.append(PairAgreement(first, second, equal, int(both.sum())))
    return agreements


def mean_agreement(pairs: list[PairAgreement]) -> float:
    """Return the share of equal judgments over all pairs of annotators; NaN without any."""
    both = sum(pair.both for pair in pairs)
    return sum(pair.equal for pair in pairs) / both if both else math.nan


def krippendorff_alpha(ratings: ArrayLike, measurement: Measurement = "nominal") -> float:
    """Return Krippendorff's alpha: 1 for full agreement, 0 for that of chance.

    With coincidences o_ck of the values c and k, their margins n_c, n = sum n_c and a distance
    d_ck: alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck (Krippendorff, Content Analysis,
    2004, chapter 11). Items judged once do not count.

    Args:
        ratings: [N, R], NaN where there is no judgment.
        measurement: `nominal` counts every difference the same; `ordinal` counts a against b for
            more than either against a tie.

    Returns:
        alpha; NaN where nothing can disagree: fewer than two judgments of one item, or one value
        everywhere.
    """
    together = coincidences(ratings).sum(axis=0)
    margins = together.sum(axis=0)
    distances = _distances(margins, measurement)
    expected = margins @ distances @ margins
    if expected == 0:
        return math.nan
    observed = (together * distances).sum()
    return float(1 - (margins.sum() - 1) * observed / expected)


def nominal_alpha(together: Floats) -> Floats:
    """Return Krippendorff's nominal alpha [...] of summed coincidences [..., 3, 3]."""
    margins = together.sum(axis=-1)
    total = margins.sum(axis=-1)
    observed = total - np.trace(together, axis1=-2, axis2=-1)
    expected = total**2 - (margins**2).sum(axis=-1)
    alpha: Floats = 1 - (total - 1) * observed / expected
    return alpha


def coincidences(ratings: ArrayLike) -> Floats:
    """Return each item's coincidences [N, 3, 3] of the values a, tie and b.

    They are the ordered pairs of judgments of one item, each item weighing as many judgments as it
    has; nothing for an item with fewer than two.
    """
    table = _table(ratings)
    counts = np.stack([(table == value).sum(axis=1) for value in CHOICES], axis=1).astype(float)
    others = np.maximum(counts.sum(axis=1) - 1, 1)
    matrices: Floats = np.einsum("ic,ik,i->ick", counts, counts, 1 / others)
    matrices -= np.einsum("ic,i,ck->ick", counts, 1 / others, np.eye(len(CHOICES)))
    matrices[counts.sum(axis=1) < 2] = 0
    return matrices


def _distances(margins: Floats, measurement: Measurement) -> Floats:
    if measurement == "nominal":
        return 1 - np.eye(len(margins))
    # Ordinal: the judgments between two values, half of either end's own, squared.
    middle = np.cumsum(margins) - margins / 2
    spread: Floats = (middle[:, None] - middle[None, :]) ** 2
    return spread


def cohen_kappa(confusion: Floats) -> Floats:
    """Return Cohen's kappa [...] (1960) of two raters' confusion matrices [..., 3, 3]."""
    total = confusion.sum(axis=(-2, -1))
    equal = np.trace(confusion, axis1=-2, axis2=-1) / total
    margins = confusion.sum(axis=-1) * confusion.sum(axis=-2)
    chance = margins.sum(axis=-1) / total**2
    kappa: Floats = (equal - chance) / (1 - chance)
    return kappa


def confusions(first: ArrayLike, second: ArrayLike) -> Floats:
    """Return each item's confusion matrix [N, 3, 3] of two raters' signs [N]: a one in one place.

    Rows are the first rater's a, tie and b, columns the second's.
    """
    left, right = (np.asarray(signs, dtype=np.int64) + 1 for signs in (first, second))
    matrices = np.zeros((len(left), 3, 3))
    matrices[np.arange(len(left)), left, right] = 1
    return matrices


def majority(ratings: ArrayLike) -> NDArray[np.int64]:
    """Return each item's verdict [N]: the side of more than half of its judgments, else a tie.

    Items without a judgment are ties too; leave them out before.
    """
    table = _table(ratings)
    judged = (~np.isnan(table)).sum(axis=1)
    wins, losses = (table == 1).sum(axis=1), (table == -1).sum(axis=1)
    return np.where(2 * wins > judged, 1, np.where(2 * losses > judged, -1, 0)).astype(np.int64)


def mean_value(ratings: ArrayLike) -> Floats:
    """Return each item's mean judgment [N] from 0 (a) over 0.5 (a tie) to 1 (b).

    Every item needs a judgment.
    """
    values: Floats = (np.nanmean(_table(ratings), axis=1) + 1) / 2
    return values


def side_bias(first: int, second: int) -> SideBias:
    """Test whether the first side shown is chosen as often as the second, ties left out."""
    return SideBias(first, second, sign_test(first, second), clopper_pearson(first, first + second))


def _table(ratings: ArrayLike) -> Floats:
    table = np.asarray(ratings, dtype=np.float64)
    assert table.ndim == 2, f"ratings are [items, annotators], got shape {table.shape}"
    known = table[~np.isnan(table)]
    assert np.isin(known, CHOICES).all(), "a judgment is -1, 0, 1 or NaN"
    return table
