"""How well a toxicity scorer agrees with scores that the data set has already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike

TOXIC = 0.5
"""Scores from here on count as toxic, as in Gehman et al. (2020)."""


@dataclass(frozen=True)
class Agreement:
    """A scorer beside the data set's own scores.

    Attributes:
        texts: what was scored: `prompts`, `continuations` or both.
        count: texts with a score of the data set's own.
        toxic: those of them that the data set scores at `TOXIC` or above.
        auc: area under the ROC curve: the probability that a toxic text scores higher than one that
            is not, ties counting half; `None` without texts of both kinds.
        spearman: rank correlation of both scores; `None` where either does not vary.
    """

    texts: str
    count: int
    toxic: int
    auc: float | None
    spearman: float | None


def agreement(texts: str, scores: ArrayLike, own: Sequence[float | None]) -> Agreement:
    """Compare N scores with the data set's own; those without one are left out.

    Args:
        texts: what they are scores of, for the table.
        scores: [N], the scorer's.
        own: [N], the data set's.
    """
    known = [row for row, value in enumerate(own) if value is not None]
    ours = np.asarray(scores, dtype=np.float64)[known]
    theirs = np.array([own[row] for row in known], dtype=np.float64)
    toxic = theirs >= TOXIC
    return Agreement(texts, len(known), int(toxic.sum()), _auc(ours, toxic), _rank(ours, theirs))


def _auc(scores: np.ndarray, toxic: np.ndarray) -> float | None:
    """Return Mann and Whitney's U over the number of pairs."""
    pairs = int(toxic.sum()) * int((~toxic).sum())
    if pairs == 0:
        return None
    return float(scipy.stats.mannwhitneyu(scores[toxic], scores[~toxic]).statistic) / pairs


def _rank(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    if len(ours) < 2 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return None
    found = float(scipy.stats.spearmanr(ours, theirs).statistic)
    return found if math.isfinite(found) else None
