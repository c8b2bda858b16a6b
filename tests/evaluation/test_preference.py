"""The summary of judged pairs, against the published study and sums of binomial terms."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest

from rlhf_exp.evaluation.preference import needed_pairs, sign_test_power, summarise_preference
from rlhf_exp.evaluation.statistics import WinCounts

STUDY = [1] * 30 + [0] * 54 + [-1] * 16


def test_the_published_study() -> None:
    found = summarise_preference(STUDY, seed=0)
    assert found.outcome == WinCounts(wins=30, ties=54, losses=16)
    # Both tails of a fair coin at least as far out as 30 of 46.
    exact = 2 * sum(comb(46, i) for i in range(30, 47)) / 2**46
    assert found.p_value == pytest.approx(exact)
    assert round(exact, 3) == 0.054
    # Published digits are cut, not rounded: 0.49751 and 0.78646.
    assert found.win_rate.low == pytest.approx(0.49751, abs=5e-6)
    assert found.win_rate.high == pytest.approx(0.78646, abs=5e-6)
    assert found.ties_as_half is not None
    assert found.ties_as_half.mean == pytest.approx(0.570)  # (30 + 54 / 2) / 100
    assert found.ties_as_half.low == pytest.approx(0.505, abs=0.0101)
    assert found.ties_as_half.high == pytest.approx(0.635, abs=0.0101)
    assert found.needed == 88
    assert found.needed_prompts == 192  # 88 * 100 / 46 = 191.3


def power_by_hand(count: int, rate: float) -> float:
    """Sum over all results that the test rejects, each with its own exact p-value."""
    total = 0.0
    for wins in range(count + 1):
        tail = sum(comb(count, i) for i in range(max(wins, count - wins), count + 1)) / 2**count
        if 2 * tail <= 0.05:
            total += comb(count, wins) * rate**wins * (1 - rate) ** (count - wins)
    return total


@pytest.mark.parametrize(("count", "rate"), [(5, 0.9), (6, 0.9), (23, 0.7), (46, 30 / 46)])
def test_power_is_the_sum_over_rejected_results(count: int, rate: float) -> None:
    assert sign_test_power(count, rate) == pytest.approx(power_by_hand(count, rate))
    assert sign_test_power(count, 1 - rate) == pytest.approx(power_by_hand(count, rate))


@pytest.mark.parametrize("rate", [30 / 46, 0.3, 0.95, 0.75])
def test_needed_pairs_are_the_smallest_number(rate: float) -> None:
    needed = needed_pairs(rate)
    assert needed is not None
    assert power_by_hand(needed, rate) >= 0.8
    assert all(power_by_hand(count, rate) < 0.8 for count in range(1, needed))


def test_an_effect_too_small_to_plan_for() -> None:
    assert needed_pairs(0.5) is None
    assert needed_pairs(0.501) is None
    assert summarise_preference([0, 0]).needed is None
    assert summarise_preference([1, -1]).needed_prompts is None


def test_several_votes_a_prompt_enter_as_their_mean() -> None:
    found = summarise_preference([1, 0, -1], values=[1.0, 2 / 3, 1 / 3])
    assert found.ties_as_half is not None
    assert found.ties_as_half.mean == pytest.approx(2 / 3)
    assert found.outcome == WinCounts(1, 1, 1)


def test_no_prompts() -> None:
    found = summarise_preference(np.array([]))
    assert found.outcome.total == 0
    assert found.ties_as_half is None
    assert (found.win_rate.low, found.win_rate.high) == (0.0, 1.0)
    assert math.isnan(found.outcome.win_rate)
