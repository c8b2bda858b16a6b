"""The config section of a small run by trlx."""

from __future__ import annotations

from typing import Any

from rlhf_exp.config.training import (
    GenerationConfig,
    KlConfig,
    PpoConfig,
    PpoRewardConfig,
    Scale,
    Schedule,
)

# 10 rollouts in batches of 4 are 3 optimizer steps an epoch, 6 an iteration: 2 iterations.
_VALUES: dict[str, Any] = {
    "steps": 12,
    "rollouts": 10,
    "batch": 4,
    "epochs": 2,
    "seq_length": 64,
    "train_blocks": 2,
    "lr": 8e-6,
    "schedule": Schedule.constant,
    "betas": [0.9, 0.95],
    "weight_decay": 1e-6,
    "grad_norm": 1.0,
    "gamma": 1.0,
    "lam": 0.95,
    "clip_range": 0.2,
    "clip_range_value": 0.3,
    "vf_coef": 0.5,
    "kl": KlConfig(coef=0.05, target=6.0, horizon=10000),
    "reward": PpoRewardConfig(clip=10.0, scale=Scale.running, missing_eos_penalty=0.0),
    "generation": GenerationConfig(max_new_tokens=8, batch=4),
    "eval_prompts": 5,
    "eval_every": 6,
    "seed": 7,
}


def section_with(**changes: Any) -> PpoConfig:
    """Return the section, some of its fields changed."""
    return PpoConfig(**{**_VALUES, **changes})
