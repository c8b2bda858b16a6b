from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_exp.evaluation.frontier import BestOfCurve, point_to_json, scalars

# Two prompts with three answers each; the reward likes them in the orders 0 < 2 < 1 and 1 < 0 < 2.
REWARD = [[1.0, 3.0, 2.0], [2.0, 0.0, 7.0]]
GOLD = [[0.9, 0.3, 0.6], [0.2, 0.4, 1.0]]
KL2, KL3 = math.log(2) - 1 / 2, math.log(3) - 2 / 3


def curve() -> BestOfCurve:
    return BestOfCurve({"reward": REWARD, "gold": GOLD}, seed=0)


def test_every_subset_counts_for_the_reward_and_for_other_judges() -> None:
    one, two, three = curve().points([3, 1, 2])
    assert [point.n for point in (one, two, three)] == [1, 2, 3]
    assert [point.kl for point in (one, two, three)] == pytest.approx([0, KL2, KL3])
    # Best of 2, of the pairs {0,1}, {0,2}, {1,2}: rewards 3, 2, 3 and 2, 7, 7; the gold judge says
    # of the answers that the reward has chosen 0.3, 0.6, 0.3 and 0.2, 1.0, 1.0.
    assert two.values["reward"].mean == pytest.approx((8 / 3 + 16 / 3) / 2)
    assert two.values["gold"].mean == pytest.approx((1.2 / 3 + 2.2 / 3) / 2)
    assert three.values["reward"].mean == pytest.approx((3 + 7) / 2)
    assert three.values["gold"].mean == pytest.approx((0.3 + 1.0) / 2)
    # Less one answer's: 2 and 3 by the reward, 0.6 and 1.6 / 3 by the gold judge.
    assert three.gains["reward"].mean == pytest.approx(((3 - 2) + (7 - 3)) / 2)
    assert three.gains["gold"].mean == pytest.approx(((0.3 - 0.6) + (1.0 - 1.6 / 3)) / 2)
    assert point_to_json(three)["gains"]["reward"]["low"] == pytest.approx(1.0)


def test_a_model_is_compared_at_its_own_kl() -> None:
    # A third of the way from best of 2 to best of 3: 4 + (5 - 4) / 3 by the reward.
    kl = KL2 + (KL3 - KL2) / 3
    model = curve().model("PPO", [kl, kl], {"reward": [4.0, 6.0]})
    assert model.over["reward"].mean == pytest.approx(5 - (4 + 1 / 3))
    assert model.values["reward"].mean == 5
    assert not model.beyond
    assert "gold" not in model.over


def test_a_model_that_stays_where_it_was() -> None:
    """One sample's KL may be below 0 where the models hardly differ."""
    model = curve().model("PPO", [-0.4, 0.2], {"reward": [2.0, 3.0]})
    assert model.over["reward"].mean == pytest.approx(2.5 - 2.5)
    assert model.kl.mean == pytest.approx(-0.1)


def test_past_the_largest_n_a_model_is_compared_with_that() -> None:
    model = curve().model("PPO", [2.0, 3.0], {"reward": [5.0, 5.0], "gold": [0.5, 0.5]})
    assert model.beyond
    assert model.over["reward"].mean == pytest.approx(5 - (3 + 7) / 2)
    assert model.over["gold"].mean == pytest.approx(0.5 - (0.3 + 1.0) / 2)


def test_the_interval_is_of_prompts_with_their_kl() -> None:
    """By an independent bootstrap: prompts are drawn whole, and the curve is read at their KL."""
    rng = np.random.default_rng(1)
    prompts, answers = 40, 8
    reward = rng.normal(size=(prompts, answers)) + rng.normal(size=(prompts, 1))
    own, kl = reward.mean(axis=1) + 0.8, rng.normal(0.5, 0.4, prompts)
    model = BestOfCurve({"reward": reward}, seed=0).model("PPO", kl, {"reward": own})
    grid = [math.log(n) - (n - 1) / n for n in range(1, answers + 1)]
    ranked = np.sort(reward, axis=1)
    weights = [
        [math.comb(r, n - 1) / math.comb(answers, n) for r in range(answers)]
        for n in range(1, answers + 1)
    ]
    expected = ranked @ np.array(weights).T  # [prompts, answers]
    leads = []
    for _ in range(2000):
        rows = rng.integers(0, prompts, prompts)
        at = np.interp(max(0.0, kl[rows].mean()), grid, expected[rows].mean(axis=0))
        leads.append(own[rows].mean() - at)
    low, high = np.quantile(leads, [0.025, 0.975])
    assert model.over["reward"].low == pytest.approx(low, abs=0.03)
    assert model.over["reward"].high == pytest.approx(high, abs=0.03)


def test_names_of_the_numbers() -> None:
    found = curve()
    models = [found.model("my run", [KL2, KL2], {"reward": [5.0, 5.0]})]
    numbers = scalars(found.points([1, 3]), models)
    assert numbers["best_of/3/reward"] == pytest.approx(5)
    assert numbers["best_of/3/gold"] == pytest.approx(0.65)
    assert numbers["best_of/3/kl"] == pytest.approx(KL3)
    assert numbers["frontier/my_run/kl"] == pytest.approx(KL2)
    assert numbers["frontier/my_run/over_best_of/reward"] == pytest.approx(5 - 4)
