from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.evaluation.reward_quality import (
    accuracy_by_margin,
    auc,
    correlation,
    distributions,
    length_report,
    pair_quality,
    rank_correlation,
    scores_by_length,
)


def test_accuracy_by_margin_by_hand() -> None:
    # By size: 0.1 (wrong), 0.2, 0.3 | 1 (wrong), 2, 3: two bins of three pairs each.
    low, high = accuracy_by_margin([3.0, -0.1, 0.2, 2.0, -1.0, 0.3], bins=2)
    assert (low.low, low.high, low.right.count, low.right.total) == (0.1, 0.3, 2, 3)
    assert (high.low, high.high, high.right.count, high.right.total) == (1.0, 3.0, 2, 3)
    # Clopper-Pearson of 2 in 3, by definition: quantiles of Beta(2, 2) and of Beta(3, 1).
    assert low.right.interval.low == pytest.approx(stats.beta.ppf(0.025, 2, 2))
    assert low.right.interval.high == pytest.approx(stats.beta.ppf(0.975, 3, 1))
    claimed = [1 / (1 + math.exp(-size)) for size in (0.1, 0.2, 0.3)]
    assert low.expected == pytest.approx(sum(claimed) / 3)


def test_bins_of_equal_numbers_and_no_more_than_pairs() -> None:
    margins = np.random.default_rng(0).normal(size=101)
    assert [found.right.total for found in accuracy_by_margin(margins)] == [21, 20, 20, 20, 20]
    assert len(accuracy_by_margin([1.0, 2.0])) == 2


def test_equal_scores_are_wrong() -> None:
    (found,) = accuracy_by_margin([0.0])
    assert (found.right.count, found.expected) == (0, 0.5)


def test_length_by_hand() -> None:
    # Pairs (margin, tokens of chosen - rejected): (+1, +4), (-1, +2), (+2, -1), (+1, 0).
    report = length_report([2.0, 1.0, 3.0, 1.0], [1.0, 2.0, 1.0, 0.0], [8, 6, 4, 5], [4, 4, 5, 5])
    # The model prefers the longer one in the first pair only; people in the first two.
    assert (report.model_longer.count, report.model_longer.total) == (1, 3)
    assert (report.label_longer.count, report.label_longer.total) == (2, 3)
    assert (report.right_longer.count, report.right_longer.total) == (1, 2)
    assert (report.right_shorter.count, report.right_shorter.total) == (1, 1)
    assert report.controlled_accuracy == 0.75


def test_correlations_agree_with_scipy() -> None:
    noise = np.random.default_rng(1)
    good, bad = noise.normal(size=(2, 40))
    long, short = noise.integers(1, 9, size=(2, 40))
    report = length_report(good, bad, long, short)
    scores, tokens = np.concatenate([good, bad]), np.concatenate([long, short])
    assert report.pearson == pytest.approx(np.corrcoef(scores, tokens)[0, 1])
    assert report.spearman == pytest.approx(stats.spearmanr(scores, tokens).statistic)
    assert rank_correlation(scores, tokens) == pytest.approx(report.spearman)
    # Within pairs: both columns less their pair's mean.
    centred = [np.stack(side) - np.mean(side, axis=0) for side in ((good, bad), (long, short))]
    assert report.within == pytest.approx(np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1])


def test_no_correlation_where_nothing_varies() -> None:
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert length_report([1.0, 2.0], [0.0, 0.0], [3, 3], [3, 3]).pearson is None
    assert length_report([1.0], [0.0], [3], [2]).controlled_accuracy is None


def test_auc_by_counting() -> None:
    above, below = [1.0, 2.0, 2.0, 5.0], [0.0, 2.0, 4.0]
    pairs = [(a > b) + 0.5 * (a == b) for a in above for b in below]
    assert auc(above, below) == pytest.approx(sum(pairs) / len(pairs))


def test_distributions_share_their_bins() -> None:
    found = distributions({"chosen": [0.0, 1.0, 3.9], "rejected": [4.0]}, bins=4)
    assert found.edges == (0.0, 1.0, 2.0, 3.0, 4.0)
    chosen, rejected = found.kinds
    assert chosen.shares == pytest.approx((1 / 3, 1 / 3, 0, 1 / 3))
    assert rejected.shares == (0, 0, 0, 1)
    assert (chosen.count, chosen.mean) == (3, pytest.approx(4.9 / 3))


def test_score_by_length() -> None:
    # The median is 7, so the answers of up to 7 tokens are one bin and the rest another.
    short, long = scores_by_length([1.0, 3.0, 10.0, 20.0, 30.0], [2, 2, 7, 7, 8], bins=2)
    assert (short.tokens, short.score, short.count) == (4.5, 8.5, 4)
    assert short.error == pytest.approx(stats.sem([1.0, 3.0, 10.0, 20.0]))
    assert (long.tokens, long.score, long.error, long.count) == (8.0, 30.0, 0.0, 1)


def test_a_judge_summarised() -> None:
    found = pair_quality(
        "rm", [2.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.5, 2.0, 0.5], [3, 4, 5], [3, 2, 1]
    )
    assert (found.accuracy.count, found.accuracy.total) == (2, 3)
    assert found.margin == pytest.approx(1 / 3)
    assert (found.chosen_over_blank.count, found.rejected_over_blank.count) == (1, 2)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["length"]["controlled_accuracy"] is None
    assert plain["accuracy"]["interval"]["low"] == pytest.approx(stats.beta.ppf(0.025, 2, 2))
