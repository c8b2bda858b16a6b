from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.algo.schedules import SCHEDULES, Schedule, lr_multiplier
from rlhf_exp.engines.trlx.settings import chunks, trl_config
from tests.engines.trlx.lab import settings_with


def config(**changes: Any) -> dict[str, Any]:
    return trl_config(settings_with(**changes), Path("/in"), Path("/handed"))


def test_trlx_is_told_all_of_it() -> None:
    """Against the fields of trlx's own config classes, as its recipe for HH fills them in."""
    assert config() == {
        "method": {
            "name": "PPOConfig",
            "ppo_epochs": 2,
            "num_rollouts": 10,
            "chunk_size": 4,
            "init_kl_coef": 0.05,
            "target": 6.0,
            "horizon": 10000,
            "gamma": 1.0,
            "lam": 0.95,
            "cliprange": 0.2,
            "cliprange_value": 0.3,
            "vf_coef": 0.5,
            "scale_reward": "running",
            "ref_mean": None,
            "ref_std": None,
            "cliprange_reward": 10.0,
            "gen_kwargs": {
                "max_new_tokens": 8,
                "do_sample": True,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
            },
        },
        "model": {"model_path": "/in", "num_layers_unfrozen": 2},
        "tokenizer": {
            "tokenizer_path": "/in",
            "padding_side": "left",
            "truncation_side": "left",
        },
        "optimizer": {
            "name": "adamw",
            "kwargs": {"lr": 8e-6, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6},
        },
        "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 1e12, "eta_min": 8e-6}},
        "train": {
            "seq_length": 64,
            "epochs": 2,
            "total_steps": 12,
            "batch_size": 4,
            "eval_interval": 6,
            "checkpoint_interval": 13,
            "checkpoint_dir": "/handed/checkpoints",
            "save_best": False,
            "save_optimizer": False,
            "pipeline": "HandedPrompts",
            "trainer": "HandedPpo",
            "tracker": None,
            "seed": 7,
        },
    }


@pytest.mark.parametrize(
    ("changes", "section", "key", "value"),
    [
        ({"train_blocks": None}, "model", "num_layers_unfrozen", -1),
        ({"kl_target": None}, "method", "target", None),
        ({"reward_clip": None}, "method", "cliprange_reward", None),
        ({"scale": "none"}, "method", "scale_reward", "ignored"),
        ({"scale": "reference"}, "method", "scale_reward", "ref"),
    ],
)
def test_values_that_trlx_writes_otherwise(
    changes: dict[str, Any], section: str, key: str, value: object
) -> None:
    assert config(**changes)[section][key] == value


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedule_is_ours(schedule: Schedule) -> None:
    found = config(schedule=schedule, steps=12)["scheduler"]
    kind = {
        "cosine_annealing": torch.optim.lr_scheduler.CosineAnnealingLR,
        "linear": torch.optim.lr_scheduler.LinearLR,
    }[found["name"]]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=8e-6)
    scheduler = kind(optimizer, **found["kwargs"])
    for step in range(12):
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(8e-6 * lr_multiplier(schedule, step, 12, 0), abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("rows", "longest", "sizes"),
    [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 64, [3]), (65, 64, [33, 32])],
)
def test_parts_are_of_like_size(rows: int, longest: int, sizes: list[int]) -> None:
    assert chunks(rows, longest) == sizes
