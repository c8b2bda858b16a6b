from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.data.rows import Prompt, Turn
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.training.optim import SCHEDULES, Schedule, lr_multiplier
from rlhf_exp.trlx.session import worker_folder
from rlhf_exp.trlx.settings import Iteration, chunks, hand_over, trl_config
from tests.trlx.lab import settings_with
from tests.trlx.test_convert import model_of


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
    settings = settings_with(chunk=4, seed=5)
    path = hand_over(tmp_path / "trlx", model, codec, prompts, validation, settings)
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
    path = hand_over(tmp_path / "trlx", model, codec, prompts, prompts, settings_with())
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


def test_the_worker_needs_nothing_of_this_project() -> None:
    """Its interpreter has no rlhf_exp, and nothing of ours stands in front of its own modules."""
    own = {path.stem for path in worker_folder().glob("*.py")} - {"__init__", "__main__"}
    assert all(name.startswith("trlx_") for name in own)
    for path in worker_folder().glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "rlhf_exp"], path


ROOT = Path(__file__).parents[2]


def iteration(**changes: object) -> Iteration:
    update = {
        "losses/total_loss": 1.0,
        "losses/policy_loss": 0.4,
        "losses/value_loss": 0.6,
        "policy/clipfrac": 0.1,
        "policy/approx_kl": 0.02,
        "old_values/mean": 0.5,
        "values/clipfrac": 0.3,
        "lr": 2e-4,
        "grad_norm": 3.0,
        "peak": 1000.0,
        "time/update": 1.0,
    }
    later = {"losses/total_loss": 2.0, "lr": 1e-4, "grad_norm": 4.0, "time/update": 2.5}
    rollouts = {
        "kl_ctl_value": 0.05,
        "policy/sqrt_kl": 0.7,
        "rollout_scores/running_std": 1.5,
        "time/rollout_generate": 0.25,
        "time/rollout_score": 0.125,
    }
    values = {
        "scaled": True,
        "scores": [1.0, 3.0],
        "deltas": [0.5, 0.0],
        "lengths": [10, 20],
        "parts": 2,
        "kl": [0.5, 1.5],
        "seconds": 1.5,
        "rollouts": rollouts,
        "updates": [update, update | later],
    }
    return Iteration(**{**values, **changes})


def test_an_iteration_in_numbers() -> None:
    assert iteration().metrics() == pytest.approx(
        {
            "reward/mean": 2.0,
            "reward/std": 1.0,  # of the two scores as a whole, not as a sample
            "reward/min": 1.0,
            "reward/max": 3.0,
            "reward/delta_mean": 0.25,
            "reward/scale": 1.5,
            "response/length_mean": 15.0,
            "kl/sequence": 1.0,
            "kl/beta": 0.05,
            "trlx/sqrt_kl": 0.7,
            "trlx/approx_kl": 0.02,
            "loss/total": 1.5,
            "loss/policy": 0.4,
            "loss/value": 0.6,
            "policy/clip_fraction": 0.1,
            "value/mean": 0.5,
            "value/clip_fraction": 0.3,
            "optim/lr": 1e-4,
            "optim/grad_norm": 4.0,
            "memory/peak_bytes": 1000.0,
            "time/rollout_s": 0.5,  # 2 parts of 0.25 s
            "time/score_s": 0.25,
            "time/assess_s": 0.75,  # 1.5 - 0.5 - 0.25
            "time/update_s": 2.5,
            "throughput/samples_per_s": 0.5,  # 2 in 1.5 + 2.5 s
            "throughput/tokens_per_s": 7.5,
        }
    )


def test_what_is_not_known_is_left_out() -> None:
    found = iteration(scaled=False, deltas=[], kl=[]).metrics()
    assert not {"reward/scale", "reward/delta_mean", "kl/sequence"} & found.keys()


def test_every_metric_is_explained() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("metrics.md", "trlx.md")]
    explained = set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", "".join(pages)))
    assert iteration().metrics().keys() <= explained
