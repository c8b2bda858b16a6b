"""How good a judge is: its agreement with people who judged the same pairs.

People do not agree with each other either, and no judge can be asked for more: so next to how often
a judge says what one person says stands how often a second person does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.evaluation.agreement import (
    cohen_kappa,
    coincidences,
    confusions,
    majority,
    nominal_alpha,
)
from rlhf_exp.evaluation.metric import estimate_from_json, estimate_to_json
from rlhf_exp.evaluation.statistics import LEVEL, Estimate
from rlhf_exp.evaluation.totals import estimate_total

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class People:
    """How far people agree with each other; the interval of each number is over pairs.

    Attributes:
        pairs: judged by anyone.
        annotators: their names.
        counts: pairs that a majority gives to a, to neither, and to b.
        agreement: share of equal judgments of two people, over all two of them; `None` where no
            pair was judged twice.
        alpha: Krippendorff's nominal alpha; likewise.
    """

    pairs: int
    annotators: tuple[str, ...]
    counts: tuple[int, int, int]
    agreement: Estimate | None
    alpha: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "pairs": self.pairs,
            "annotators": list(self.annotators),
            "counts": list(self.counts),
            "agreement": estimate_to_json(self.agreement),
            "alpha": estimate_to_json(self.alpha),
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> People:
        """Undo `to_json`."""
        a, tie, b = plain["counts"]
        return cls(
            plain["pairs"],
            tuple(plain["annotators"]),
            (a, tie, b),
            estimate_from_json(plain["agreement"]),
            estimate_from_json(plain["alpha"]),
        )


@dataclass(frozen=True)
class Quality:
    """How far a judge agrees with people; the interval of each number is over pairs.

    Attributes:
        judge: its name.
        pairs: judged by the judge and by people.
        confusion: [3][3] numbers of pairs; rows are the majority's a, tie and b, columns the
            judge's.
        agreement: share of pairs on which judge and majority say the same, ties included.
        decided: the same among pairs that neither calls a tie; `None` where there are none.
        kappa: Cohen's, of judge and majority.
        alpha: Krippendorff's nominal alpha, of judge and majority.
        with_one: share of single people's judgments that the judge shares: to be compared with
            `People.agreement`.
    """

    judge: str
    pairs: int
    confusion: tuple[tuple[int, ...], ...]
    agreement: Estimate
    decided: Estimate | None
    kappa: Estimate
    alpha: Estimate
    with_one: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain: dict[str, Any] = {
            "judge": self.judge,
            "pairs": self.pairs,
            "confusion": [list(row) for row in self.confusion],
        }
        return plain | {name: estimate_to_json(getattr(self, name)) for name in _ESTIMATES}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Quality:
        """Undo `to_json`."""
        found = {name: estimate_from_json(plain[name]) for name in _ESTIMATES}
        confusion = tuple(tuple(row) for row in plain["confusion"])
        return cls(plain["judge"], plain["pairs"], confusion, **found)  # type: ignore[arg-type]


_ESTIMATES = ("agreement", "decided", "kappa", "alpha", "with_one")


def people_of(
    ratings: ArrayLike, annotators: Sequence[str], seed: int = 0, level: float = LEVEL
) -> People:
    """Summarise what people say.

    Args:
        ratings: [N, R] signs, NaN where there is no judgment.
        annotators: names of the R people.
        seed: of the bootstrap.
        level: of the intervals.
    """
    table = _judged(ratings)
    verdicts = majority(table)
    together = coincidences(table)
    agreement = alpha = None
    if together.any():
        equal, both = _equal_pairs(table)
        agreement = _share(equal, both, seed, level)
        alpha = _of_matrices(together, nominal_alpha, seed, level)
    a, tie, b = (int((verdicts == sign).sum()) for sign in (-1, 0, 1))
    return People(len(table), tuple(annotators), (a, tie, b), agreement, alpha)


def quality(
    judge: str, signs: ArrayLike, ratings: ArrayLike, seed: int = 0, level: float = LEVEL
) -> Quality:
    """Compare a judge with people.

    Args:
        judge: its name.
        signs: [N] its verdicts: 1 where b is preferred, 0 for a tie, -1 for a.
        ratings: [N, R] people's signs, NaN where there is no judgment; pairs that nobody judged
            are left out.
        seed: of the bootstrap.
        level: of the intervals.
    """
    everything = np.asarray(ratings, dtype=np.float64)
    judged = (~np.isnan(everything)).any(axis=1)
    table, said = everything[judged], np.asarray(signs, dtype=np.int64)[judged]
    each = confusions(majority(table), said)
    total = each.sum(axis=0)
    decided = total[0, 0] + total[0, 2] + total[2, 0] + total[2, 2] > 0
    known = ~np.isnan(table)
    equal = ((table == said[:, None]) & known).sum(axis=1)
    return Quality(
        judge=judge,
        pairs=len(table),
        confusion=tuple(tuple(int(count) for count in row) for row in total),
        agreement=_of_matrices(each, _equal_share, seed, level),
        decided=_of_matrices(each, _decided_share, seed, level) if decided else None,
        kappa=_of_matrices(each, cohen_kappa, seed, level),
        alpha=_of_matrices(each + each.swapaxes(1, 2), nominal_alpha, seed, level),
        with_one=_share(equal, known.sum(axis=1), seed, level),
    )


def _judged(ratings: ArrayLike) -> Floats:
    table = np.asarray(ratings, dtype=np.float64)
    return table[(~np.isnan(table)).any(axis=1)]


def _equal_pairs(table: Floats) -> tuple[Floats, Floats]:
    """Return, for each item, how many two people agree, and how many two people judged it."""
    equal, both = np.zeros(len(table)), np.zeros(len(table))
    for first, second in combinations(range(table.shape[1]), 2):
        left, right = table[:, first], table[:, second]
        equal += left == right
        both += ~np.isnan(left) & ~np.isnan(right)
    return equal, both


def _share(parts: ArrayLike, wholes: ArrayLike, seed: int, level: float) -> Estimate:
    columns = np.stack([np.asarray(parts), np.asarray(wholes)], axis=1)
    return estimate_total(columns, lambda sums: sums[:, 0] / sums[:, 1], seed, level)


def _of_matrices(
    each: Floats,
    statistic: Any,  # noqa: ANN401 - [..., 3, 3] to [...]
    seed: int,
    level: float,
) -> Estimate:
    def of_sums(sums: Floats) -> Floats:
        found: Floats = statistic(sums.reshape(-1, 3, 3))
        return found

    return estimate_total(each.reshape(len(each), 9), of_sums, seed, level)


def _equal_share(confusion: Floats) -> Floats:
    found: Floats = np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=(-2, -1))
    return found


def _decided_share(confusion: Floats) -> Floats:
    right = confusion[..., 0, 0] + confusion[..., 2, 2]
    found: Floats = right / (right + confusion[..., 0, 2] + confusion[..., 2, 0])
    return found
