"""`eval.reward_quality`: how good the reward model is, and how far it can be pushed."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.config.fields import setting


@dataclass
class RewardQualityConfig:
    """Held-out pairs, and the reward of optimised policies against KL."""

    referee: str | None = setting(
        None,
        "A second reward model, not the one PPO maximised: a run, key, folder or hub id.",
        key=False,  # its weights count, not what it is called
    )
    pairs: int = setting(2000, "Most held-out pairs scored.", neutral=2000)
    prompts: int = setting(100, "Held-out prompts for the reward against KL.", neutral=100)
    best_of: int = setting(
        16, "Answers of the baseline to each prompt, for best-of-n; 1: none.", neutral=16
    )
