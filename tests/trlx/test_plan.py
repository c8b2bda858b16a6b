from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.config.training import (
    GenerationConfig,
    KlConfig,
    PpoRewardConfig,
    Scale,
    Schedule,
)
from rlhf_exp.data.rows import Prompt, Turn
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.training.optim import SCHEDULES, lr_multiplier
from rlhf_exp.training.optim import Schedule as ScheduleName
from rlhf_exp.trlx.plan import chunks, hand_over, trl_config
from tests.trlx.lab import section_with
from tests.trlx.test_convert import model_of


def config(**changes: Any) -> dict[str, Any]:
    section = section_with(**changes)
    return trl_config(section, section.steps, Path("/in"), Path("/handed"))


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
        ({"kl": KlConfig(target=None)}, "method", "target", None),
        ({"reward": PpoRewardConfig(clip=None)}, "method", "cliprange_reward", None),
        ({"reward": PpoRewardConfig(scale=Scale.none)}, "method", "scale_reward", "ignored"),
        ({"reward": PpoRewardConfig(scale=Scale.reference)}, "method", "scale_reward", "ref"),
    ],
)
def test_values_that_trlx_writes_otherwise(
    changes: dict[str, Any], section: str, key: str, value: object
) -> None:
    assert config(**changes)[section][key] == value


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedule_is_ours(schedule: ScheduleName) -> None:
    found = config(schedule=Schedule(schedule), steps=12)["scheduler"]
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


def prompts_of(codec: Codec, count: int) -> TokenizedPrompts:
    rows = [
        Prompt((Turn("human", f"What is {n} plus {n}?"),), f"It is {2 * n}.", f"row {n}")
        for n in range(count)
    ]
    return tokenize_prompts(rows, codec, 64, 8)


def test_what_the_worker_is_given(tmp_path: Path) -> None:
    codec = Codec(train_tokenizer(["What is it plus it? It is so."], 300), "hh")
    model = model_of("gpt2")
    prompts, validation = prompts_of(codec, 7), prompts_of(codec, 9)
    section = section_with(generation=GenerationConfig(max_new_tokens=8, batch=4), seed=5)
    path = hand_over(tmp_path / "trlx", model, codec, prompts, validation, section, 12, 1)
    plan = json.loads(path.read_text())
    # 2 iterations of 10 rollouts over 7 prompts: passes laid end to end, each of all prompts.
    assert len(plan["order"]) == 20
    assert sorted(plan["order"][:7]) == sorted(plan["order"][7:14]) == list(range(7))
    assert plan["order"][:7] == np.random.default_rng([5, 0]).permutation(7).tolist()
    assert plan["sizes"] == [4, 3, 3]
    rows = [json.loads(line) for line in Path(plan["prompts"]).read_text().splitlines()]
    assert rows == [{"index": n, "ids": prompts.prompt[n].tolist()} for n in range(7)]
    lines = Path(plan["validation"]).read_text().splitlines()
    assert len(lines) == 5, "ppo.eval_prompts of them"
    assert plan["stop_strings"] == ["Human:", "human:", "Assistant:", "assistant:"]
    assert Path(plan["weights"]).parent == path.parent
    assert plan["config"]["model"]["model_path"] == str(path.parent / "model")


def test_what_the_worker_compares(tmp_path: Path) -> None:
    codec = Codec(train_tokenizer(["What is it plus it? It is so."], 300), "hh")
    model = model_of("gpt_neox")
    prompts = prompts_of(codec, 3)
    path = hand_over(tmp_path / "trlx", model, codec, prompts, prompts, section_with(), 12, 1)
    check = json.loads(path.read_text())["check"]
    assert check["ids"] == [*prompts.prompt[0].tolist(), codec.eos_id]
    with torch.no_grad():
        logits = model(torch.tensor([check["ids"]])).logits[0].double()
    for number, token in enumerate(check["ids"][1:]):
        row = logits[number]
        expected = float(row[token] - row.exp().sum().log())
        assert abs(check["logprobs"][number] - expected) < 1e-5
    assert check["texts"][:2] == [
        "\n\nHuman: What is 0 plus 0?\n\nAssistant:",
        " It is 0.<|endoftext|>",
    ]
    assert check["text_ids"][1] == prompts.original[0].tolist()
    assert len(check["texts"]) == len(check["text_ids"]) == 6
