"""Statistics against the published study, exact enumeration and scipy's own bootstrap."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.evaluation import statistics as s
from rlhf_exp.evaluation.statistics import calibration

# The published study of people's choices between the two models: 30 better, 54 ties, 16 worse.
STUDY = s.WinCounts(wins=30, ties=54, losses=16)
STUDY_VALUES = np.array([1.0] * 30 + [0.5] * 54 + [0.0] * 16)


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k), summed term by term."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_outcome_of_the_published_study() -> None:
    assert STUDY.total == 100
    assert STUDY.decided == 46
    assert round(STUDY.win_rate, 3) == 0.652  # 30 / 46
    assert STUDY.ties_as_half == pytest.approx(0.570)  # (30 + 27) / 100


def test_sign_test_of_the_published_study() -> None:
    # Two-sided: both tails of a fair coin at least as far out as 30 of 46.
    expected = 2 * sum(comb(46, i) for i in range(30, 47)) / 2**46
    assert s.sign_test(30, 16) == pytest.approx(expected, rel=1e-9)
    assert round(expected, 3) == 0.054
    assert s.sign_test(16, 30) == pytest.approx(expected, rel=1e-9)


def test_sign_test_without_decided_pairs_or_with_balanced_ones() -> None:
    assert s.sign_test(0, 0) == 1.0
    assert s.sign_test(7, 7) == 1.0
    assert s.sign_test(5, 0) == pytest.approx(2 / 32)  # both all-heads and all-tails


def test_clopper_pearson_of_the_published_study() -> None:
    found = s.clopper_pearson(30, 46)
    # Written 0.497-0.786 where cut to three digits: 0.49751 and 0.78646.
    assert found.low == pytest.approx(0.49751, abs=5e-6)
    assert found.high == pytest.approx(0.78646, abs=5e-6)
    # The definition: at each end, the outcome's tail has probability 2.5 %.
    assert binomial_tail(30, 46, found.low) == pytest.approx(0.025, abs=1e-6)
    assert 1 - binomial_tail(31, 46, found.high) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 7), (3, 7), (7, 7), (499, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_clopper_pearson_is_that_of_scipy(k: int, n: int, level: float) -> None:
    found = s.clopper_pearson(k, n, level)
    expected = stats.binomtest(k, n).proportion_ci(level, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_clopper_pearson_at_the_edges() -> None:
    assert s.clopper_pearson(0, 0) == s.Interval(0.0, 1.0)
    none = s.clopper_pearson(0, 10)
    assert none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 10))  # (1 - p)^10 = 0.025
    assert s.clopper_pearson(10, 10).high == 1.0
    assert s.clopper_pearson(30, 46, level=0.99).low < s.clopper_pearson(30, 46).low


def test_outcomes_go_by_the_bradley_terry_probability() -> None:
    # sigmoid(x) = 0.6 at x = ln(0.6 / 0.4) = 0.405465
    edge = math.log(0.6 / 0.4)
    differences = np.array([edge + 1e-6, edge - 1e-6, 0.0, -edge + 1e-6, -edge - 1e-6])
    baseline = np.array([3.0, -2.0, 0.5, 0.0, 1.0])
    assert list(s.outcome_signs(baseline, baseline + differences)) == [1, 0, 0, 0, -1]
    assert s.outcomes(baseline, baseline + differences) == s.WinCounts(1, 3, 1)
    # Without a band only equal scores tie.
    assert s.outcomes(baseline, baseline + differences, (0.5, 0.5)) == s.WinCounts(2, 1, 2)


def test_outcomes_of_extreme_scores_do_not_overflow() -> None:
    with np.errstate(over="raise"):
        assert s.outcomes([1e6, -1e6], [-1e6, 1e6]) == s.WinCounts(1, 0, 1)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0, math.nan], [1.0, 2.0], "first values must be finite: row 1"),
        ([1.0, 2.0], [math.inf, 2.0], "second values must be finite: row 0"),
    ],
)
def test_unusable_pairs_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        s.outcomes(a, b)


def test_bootstrap_interval_of_the_published_study() -> None:
    found = s.bootstrap_mean(STUDY_VALUES, seed=0)
    other = stats.bootstrap(
        (STUDY_VALUES,),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert found.low == pytest.approx(0.505, abs=0.006)
    assert found.high == pytest.approx(0.635, abs=0.006)
    assert found.low == pytest.approx(other.low, abs=0.006)
    assert found.high == pytest.approx(other.high, abs=0.006)


def test_bootstrap_is_a_function_of_the_seed_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(3).normal(size=300)
    once = s.bootstrap_mean(values, seed=1)
    assert s.bootstrap_mean(values, seed=1) == once
    assert s.bootstrap_mean(values, seed=2) != once
    monkeypatch.setattr(s, "_BLOCK", 10 * len(values))
    assert s.bootstrap_mean(values, seed=1) == once  # the memory bound changes no draw


def test_bootstrap_of_one_value_claims_no_precision() -> None:
    assert s.bootstrap_mean([2.0], seed=0) == s.Interval(-math.inf, math.inf)
    assert s.estimate_mean([2.0], seed=0).mean == 2.0


def test_bootstrap_coverage_is_near_the_level() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        found = s.bootstrap_mean(generator.normal(1.0, 2.0, size=60), seed=trial)
        held += found.low <= 1.0 <= found.high
    # 200 trials at 95 %: 190 expected, standard deviation 3.1; the percentile bootstrap is a little
    # narrow at N = 60.
    assert 178 <= held <= 199


def test_paired_difference_uses_the_pairing() -> None:
    generator = np.random.default_rng(4)
    a = generator.normal(0, 10, size=200)
    b = a + 0.5 + generator.normal(0, 0.1, size=200)
    found = s.paired_difference(a, b, seed=0)
    assert found.mean == pytest.approx((b - a).mean())
    # Paired: 1.96 * 0.1 / sqrt(200) = 0.014 on each side; unpaired it would be 1.96.
    assert found.high - found.low == pytest.approx(0.028, rel=0.25)
    assert found.excludes_zero
    assert not s.paired_difference(a, a[::-1], seed=0).excludes_zero


def test_difference_in_standard_deviations() -> None:
    # std of 0, 2, 4 with n - 1 = sqrt(8 / 2) = 2; mean gain (1 + 3 + 2) / 3 = 2; ratio 1.
    found = s.standardised_difference([0.0, 2.0, 4.0], [1.0, 5.0, 6.0], seed=0)
    assert found is not None
    assert found.mean == pytest.approx(1.0)

    generator = np.random.default_rng(8)
    a = generator.normal(0, 2, size=150)
    b = a + generator.normal(1, 1, size=150)
    found = s.standardised_difference(a, b, seed=0)
    other = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (y - x).mean(axis) / x.std(axis, ddof=1),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found is not None
    assert found.low == pytest.approx(other.low, abs=0.02)
    assert found.high == pytest.approx(other.high, abs=0.02)


def test_difference_in_standard_deviations_needs_a_spread() -> None:
    assert s.standardised_difference([1.0, 1.0], [2.0, 3.0], seed=0) is None
    assert s.standardised_difference([1.0], [2.0], seed=0) is None


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
