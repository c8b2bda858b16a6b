"""Whether a reward model's confidence is deserved.

The predicted probability that the preferred side wins is sigmoid(margin) (Bradley and Terry 1952).
Each pair is read in the direction the model favours, so that a probability runs from 0.5 to 1 and
is compared with the share of pairs in which the model was right (Guo et al. 2017).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 5


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


def calibration(margins: ArrayLike, bins: int = BINS) -> Calibration:
    """Return the curve of N pairs.

    Args:
        margins: [N] score of the preferred side minus that of the other.
        bins: Equal parts of the range from 0.5 to 1; empty ones are left out.
    """
    values = np.asarray(margins, dtype=np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(values)))
    right = np.where(values == 0.0, 0.5, (values > 0.0).astype(np.float64))
    number = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside = number == index
        if inside.any():
            count = int(inside.sum())
            predicted, observed = float(confidence[inside].mean()), float(right[inside].mean())
            found.append(CalibrationBin(predicted, observed, count))
    error = sum(item.count * abs(item.predicted - item.observed) for item in found)
    return Calibration(tuple(found), error / len(values))
