"""Agreement against the `krippendorff` package, plain counting and a published example."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import krippendorff
import numpy as np
import pytest

from rlhf_exp.evaluation import agreement as a

NAN = math.nan


@pytest.fixture(scope="module")
def pandalm(shared_data: Path) -> np.ndarray:
    """999 items judged by three people: 1 where the second response is preferred."""
    path = shared_data / "pairwise" / "pandalm_testset_v1.json.gz"
    rows = json.loads(gzip.decompress(path.read_bytes()))
    said = {0: 0.0, 1: -1.0, 2: 1.0}
    return np.array([[said[row[f"annotator{k}"]] for k in (1, 2, 3)] for row in rows])


def test_agreement_of_three_people_on_real_answers(pandalm: np.ndarray) -> None:
    pairs = a.pairwise_agreement(pandalm)
    by_hand = {
        (i, j): sum(row[i] == row[j] for row in pandalm.tolist())
        for i, j in ((0, 1), (0, 2), (1, 2))
    }
    assert {(pair.first, pair.second): pair.equal for pair in pairs} == by_hand
    assert [pair.both for pair in pairs] == [999] * 3
    assert [round(pair.share, 4) for pair in pairs] == [0.9129, 0.9289, 0.9179]
    assert a.mean_agreement(pairs) == pytest.approx(sum(by_hand.values()) / (3 * 999))


@pytest.mark.parametrize("measurement", ["nominal", "ordinal"])
def test_alpha_of_three_people_on_real_answers(
    pandalm: np.ndarray, measurement: a.Measurement
) -> None:
    with_gaps = pandalm.copy()
    with_gaps[np.random.default_rng(0).random(pandalm.shape) < 0.3] = NAN
    for ratings in (pandalm, with_gaps):
        other = krippendorff.alpha(
            reliability_data=ratings.T, level_of_measurement=measurement, value_domain=[-1, 0, 1]
        )
        assert a.krippendorff_alpha(ratings, measurement) == pytest.approx(other, abs=1e-12)


def test_alpha_by_hand() -> None:
    # Two annotators, items (1,1), (1,1), (-1,-1), (1,-1): margins 5 and 3, n = 8. Observed: the
    # last item's two ordered pairs, 2. Expected: 2 * 5 * 3 = 30. alpha = 1 - 7 * 2 / 30 = 0.5333.
    ratings = [[1, 1], [1, 1], [-1, -1], [1, -1]]
    assert a.krippendorff_alpha(ratings) == pytest.approx(1 - 14 / 30)
    # A fifth item that only one has judged says nothing about agreement.
    assert a.krippendorff_alpha([*ratings, [0, NAN]]) == pytest.approx(1 - 14 / 30)


def test_alpha_where_nothing_can_disagree() -> None:
    assert math.isnan(a.krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(a.krippendorff_alpha([[1, NAN], [NAN, -1]]))
    assert a.krippendorff_alpha([[1, 1], [-1, -1]]) == 1.0


def test_majority_needs_more_than_half() -> None:
    ratings = [
        [1, 1, -1],  # 2 of 3
        [1, 0, -1],  # everyone says something else
        [1, 1, NAN],
        [-1, 0, NAN],  # one of two is no majority
        [-1, -1, -1],
        [1, -1, NAN],
        [1, NAN, NAN],
    ]
    assert a.majority(ratings).tolist() == [1, 0, 1, 0, -1, 0, 1]
    # Means by hand: (1+1-1)/3 = 1/3 -> 2/3; 0 -> 1/2; 1 -> 1; -1/2 -> 1/4; 0; 1/2; 1.
    expected = [2 / 3, 0.5, 1, 0.25, 0, 0.5, 1]
    assert a.mean_value(ratings) == pytest.approx(np.array(expected))


def test_annotators_without_common_items() -> None:
    (pair,) = a.pairwise_agreement([[1, NAN], [NAN, 1]])
    assert pair.both == 0
    assert math.isnan(pair.share)
    assert math.isnan(a.mean_agreement([pair]))


def test_side_bias() -> None:
    found = a.side_bias(9, 1)
    assert found.p_value == pytest.approx(2 * 11 / 1024)  # 2 * (C(10,9) + C(10,10)) / 2^10
    assert found.share == 0.9
    assert a.side_bias(5, 5).p_value == 1.0
    assert math.isnan(a.side_bias(0, 0).share)
