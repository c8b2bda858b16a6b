"""Settings of a small run by trlx."""

from __future__ import annotations

from typing import Any

from rlhf_exp.trlx.settings import TrlxSettings

# 10 rollouts in batches of 4 are 3 optimizer steps an epoch, 6 an iteration: 2 iterations.
_VALUES: dict[str, Any] = {
    "steps": 12,
    "rollouts": 10,
    "batch": 4,
    "epochs": 2,
    "chunk": 4,
    "seq_length": 64,
    "max_new_tokens": 8,
    "train_blocks": 2,
    "lr": 8e-6,
    "schedule": "constant",
    "betas": (0.9, 0.95),
    "weight_decay": 1e-6,
    "grad_norm": 1.0,
    "gamma": 1.0,
    "lam": 0.95,
    "clip_range": 0.2,
    "clip_range_value": 0.3,
    "vf_coef": 0.5,
    "kl_coef": 0.05,
    "kl_target": 6.0,
    "kl_horizon": 10000,
    "reward_clip": 10.0,
    "scale": "running",
    "missing_eos_penalty": 0.0,
    "eval_prompts": 5,
    "eval_every": 6,
    "seed": 7,
    "threads": 1,
}


def settings_with(**changes: Any) -> TrlxSettings:
    """Return settings, some of them changed."""
    return TrlxSettings(**{**_VALUES, **changes})
