"""`reward`: the reward model's training (how PPO uses a reward is `ppo.reward`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting
from rlhf_exp.config.training import TrainingConfig


class RewardInit(Enum):
    """Where the reward model's trunk comes from."""

    sft = "sft"
    base = "base"


@dataclass
class RewardConfig(TrainingConfig):
    """Reward model from pairwise preferences."""

    steps: int | None = setting(None, "Optimizer steps; null: as `epochs` says.")
    epochs: float | None = setting(1.0, "Passes over the pairs, where `steps` is null.")
    seq_length: int = setting(256, "Longest sequence in tokens; longer prompts lose their start.")
    part: str | None = setting(
        None,
        "Train on one part of the pairs, chosen by prompt, such as 1/2; null: on all.",
        neutral=None,
    )
    init: RewardInit = setting(RewardInit.sft, "Trunk: the SFT model's, or the base model's.")
