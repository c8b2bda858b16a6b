"""The divisor of scores in the objective of PPO's evaluations."""

from __future__ import annotations

import pytest

from rlhf_exp.config.training import PpoConfig, PpoRewardConfig, Scale
from rlhf_exp.training.ppo_objective import score_unit


@pytest.mark.parametrize(
    ("scale", "deviation", "expected"),
    [
        (Scale.running, 0.5, 0.5),
        (Scale.running, 0.0, 1.0),
        (Scale.running, 1e-9, 1.0),  # of scores of 3: rounding
        (Scale.none, 0.5, 1.0),
    ],
)
def test_the_divisor_of_scores(scale: Scale, deviation: float, expected: float) -> None:
    section = PpoConfig(reward=PpoRewardConfig(scale=scale))
    assert score_unit(section, {"eval/reward_mean": -3.0, "eval/reward_std": deviation}) == expected
