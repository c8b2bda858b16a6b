from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation.calibration import calibration


def margin(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_numbers_by_hand() -> None:
    # Confidences 0.52, 0.58 (right, wrong) fall into 0.5-0.6; 0.72 and 0.72 (right, right) into
    # 0.7-0.8; 0.95 (wrong) into 0.9-1.
    margins = [margin(0.52), -margin(0.58), margin(0.72), margin(0.72), -margin(0.95)]
    found = calibration(margins, bins=5)
    bins = [(item.predicted, item.observed, item.count) for item in found.bins]
    assert bins == [
        (pytest.approx(0.55), 0.5, 2),
        (pytest.approx(0.72), 1.0, 2),
        (pytest.approx(0.95), 0.0, 1),
    ]
    # (2 |0.55 - 0.5| + 2 |0.72 - 1| + 1 |0.95 - 0|) / 5 = (0.1 + 0.56 + 0.95) / 5
    assert found.error == pytest.approx(1.61 / 5)
    assert found.to_json()["bins"][2] == {
        "predicted": pytest.approx(0.95),
        "observed": 0.0,
        "count": 1,
    }


def test_a_tie_is_half_right() -> None:
    (only,) = calibration([0.0, 0.0]).bins
    assert (only.predicted, only.observed, only.count) == (0.5, 0.5, 2)


def test_confidence_without_bounds() -> None:
    found = calibration([1e4, -1e4])
    (only,) = found.bins
    assert (only.predicted, only.observed, only.count) == (1.0, 0.5, 2)
    assert found.error == 0.5
