"""What a study maximises, on a curve whose objectives are worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.search.pruning import TrialObjective, evaluation_rows

# Reward rises with KL until the policy exploits the reward model, and KL runs away.
CURVE = [
    {"global_step": 0, "eval/reward_mean": 0.1, "eval/kl_sequence": 0.0, "eval/reward_std": 2.0},
    {"global_step": 1, "reward/mean": 9.0},
    {"global_step": 2, "eval/reward_mean": 0.9, "eval/kl_sequence": 4.0, "eval/reward_std": 1.0},
    {"global_step": 4, "eval/reward_mean": 0.7, "eval/kl_sequence": 8.0, "eval/reward_std": 1.0},
    {"global_step": 6, "eval/reward_mean": 3.0, "eval/kl_sequence": 40.0, "eval/reward_std": 1.0},
]
for row, won in zip([CURVE[0], *CURVE[2:]], (0.5, 0.6, 0.8, 0.55), strict=True):
    row["eval/win_rate"] = won


def measure(
    name: str, budget: float = 10.0, coef: float = 0.05, scaled: bool = False
) -> TrialObjective:
    return TrialObjective(name, budget, coef, scaled)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # KL 0, 4 and 8 are within 10; the most reward among them is at 4.
        (measure("reward_at_kl"), 0.9),
        (measure("reward_at_kl", budget=4.0), 0.9),
        (measure("reward_at_kl", budget=3.9), 0.1),
        (measure("reward_at_kl", budget=40.0), 3.0),
        (measure("final_reward"), 3.0),
        # More prompts are won at KL 8 than at 4, though by less.
        (measure("win_rate_at_kl"), 0.8),
        (measure("win_rate_at_kl", budget=7.9), 0.6),
        # 0.1, 0.9 - 0.2 = 0.7, 0.7 - 0.4 = 0.3, 3 - 2 = 1
        (measure("penalised_reward"), 1.0),
        # 0.1, 0.9 - 0.4 = 0.5, 0.7 - 0.8 = -0.1, 3 - 4 = -1
        (measure("penalised_reward", coef=0.1), 0.5),
        # Rewards in the first evaluation's 2.0: 0.05, 0.45 - 0.4 = 0.05, ..., with 0.05:
        # 0.05, 0.45 - 0.2 = 0.25, 0.35 - 0.4 = -0.05, 1.5 - 2 = -0.5
        (measure("penalised_reward", scaled=True), 0.25),
    ],
)
def test_objectives(asked: TrialObjective, expected: float) -> None:
    assert asked.value(CURVE) == pytest.approx(expected)


def test_rewards_that_differ_by_rounding_are_not_divided() -> None:
    rows = [row | {"eval/reward_std": 1e-9} for row in CURVE]
    assert measure("penalised_reward", scaled=True).value(rows) == pytest.approx(1.0)


def test_nothing_within_the_budget_is_below_everything() -> None:
    assert measure("reward_at_kl", budget=1.0).value(CURVE[2:]) == -math.inf


@pytest.mark.parametrize("key", ["eval/reward_mean", "eval/kl_sequence"])
def test_a_number_that_is_none_makes_the_whole_run_none(key: str) -> None:
    broken = [*CURVE[:2], CURVE[2] | {key: math.nan}, *CURVE[3:]]
    for name in ("reward_at_kl", "final_reward", "penalised_reward"):
        assert math.isnan(measure(name).value(broken))
    assert math.isnan(measure("final_reward").value([]))


def test_a_run_without_win_rates_has_none() -> None:
    """Their absence is nobody else's matter."""
    without = [{name: row[name] for name in row if name != "eval/win_rate"} for row in CURVE]
    assert math.isnan(measure("win_rate_at_kl").value(without))
    assert measure("reward_at_kl").value(without) == 0.9


def test_rows_without_an_evaluation_are_left_out() -> None:
    assert [row["global_step"] for row in evaluation_rows(CURVE)] == [0, 2, 4, 6]
