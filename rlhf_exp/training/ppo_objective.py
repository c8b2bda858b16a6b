"""The objective of PPO's evaluations, and the score that selects the best weights.

Both engines use it, so that a run by trlx and one by this project are judged alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf_exp.algo.rounding import divisor
from rlhf_exp.config.training import PpoConfig, Scale, SelectBy

SHOWN = 20
"""Answers in the table of samples, from the first on."""


def score_unit(section: PpoConfig, first: Mapping[str, float]) -> float:
    """Return the divisor of scores in the objective, from the first evaluation's metrics."""
    if section.reward.scale is Scale.none:
        return 1.0
    return divisor(first["eval/reward_std"], abs(first["eval/reward_mean"]))


def objective(section: PpoConfig, metrics: Mapping[str, float], unit: float) -> float:
    """Return an evaluation's reward less the KL penalty, scores divided by `unit`."""
    kl = section.kl
    coef = kl.coef if kl.select_coef is None else kl.select_coef
    return metrics["eval/reward_mean"] / unit - coef * metrics["eval/kl_sequence"]


def selection_score(section: PpoConfig, metrics: Mapping[str, float], unit: float) -> float:
    """Return the number by which the best weights are selected."""
    budget, by_wins = section.kl.budget, section.select_by is SelectBy.win_rate
    if budget is None and not by_wins:
        return objective(section, metrics, unit)
    if budget is not None and metrics["eval/kl_sequence"] > budget:
        return -math.inf
    return metrics["eval/win_rate"] if by_wins else metrics["eval/reward_mean"] / unit
