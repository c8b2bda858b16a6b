"""What TRL is told: the fields of its own config classes, the order of rows, the rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_exp.config.training import (
    AdvantageEstimator,
    DpoConfig,
    DpoLoss,
    GenerationConfig,
    GroupScale,
    KlConfig,
    LossMean,
    PpoConfig,
    Schedule,
)
from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.rows import Preference, Prompt, Turn
from rlhf_exp.data.tokenized import tokenize_preferences, tokenize_prompts
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.trl.plan import (
    hand_over_pairs,
    hand_over_rollouts,
    pair_arguments,
    rollout_arguments,
)

SECTION = PpoConfig(
    steps=8,
    rollouts=12,
    batch=6,
    micro_batch=3,
    epochs=2,
    samples_per_prompt=4,
    advantage=AdvantageEstimator.grpo,
    loss_mean=LossMean.sequences,
    lr=2e-5,
    betas=[0.8, 0.9],
    weight_decay=0.1,
    grad_norm=0.5,
    clip_range=0.3,
    warmup_steps=2,
    schedule=Schedule.linear,
    kl=KlConfig(coef=0.07, target=None, unbiased=False),
    generation=GenerationConfig(max_new_tokens=9, temperature=0.7, batch=2),
    eval_prompts=2,
    eval_every=4,
    train_blocks=1,
    seed=5,
)
DPO = DpoConfig(steps=3, epochs=None, batch=4, seq_length=32, eval_prompts=2, seed=5, beta=0.2)


def test_grpo_is_told_all_of_it() -> None:
    found = rollout_arguments(SECTION, 8)
    expected = {
        "max_steps": 8,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,  # 6 / 3
        "steps_per_generation": 4,  # 12 responses in micro-batches of 3
        "num_iterations": 2,
        "num_generations": 4,
        "max_completion_length": 9,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.07,
        "epsilon": 0.3,
        "scale_rewards": "group",
        "loss_type": "grpo",
        "use_bias_correction_kl": False,
        "learning_rate": 2e-5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "seed": 5,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    other = replace(SECTION, grpo_scale=GroupScale.none, loss_mean=LossMean.tokens)
    found = rollout_arguments(other, 8)
    assert (found["scale_rewards"], found["loss_type"]) == ("none", "bnpo")


def test_rloo_knows_nothing_of_grpo() -> None:
    found = rollout_arguments(replace(SECTION, advantage=AdvantageEstimator.rloo), 8)
    assert not {"scale_rewards", "loss_type", "use_bias_correction_kl"} & found.keys()


@pytest.mark.parametrize(
    ("loss", "by_token", "theirs"),
    [
        (DpoLoss.sigmoid, False, "sigmoid"),
        (DpoLoss.sigmoid, True, "sigmoid_norm"),
        (DpoLoss.hinge, False, "hinge"),
        (DpoLoss.ipo, True, "ipo"),
    ],
)
def test_dpos_losses(loss: DpoLoss, by_token: bool, theirs: str) -> None:
    found = pair_arguments(replace(DPO, loss=loss, length_normalised=by_token), 3)
    assert found["loss_type"] == [theirs]
    assert (found["beta"], found["max_length"]) == (0.2, 32)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(train_tokenizer(["What is it? It is so. Go on, say no more."], 270), "hh")


def policy(codec: Codec) -> Policy:
    shape = Architecture("llama", 2, 16, 2, 32, codec.vocab_size, 64)
    model = build_causal_lm(shape, seed=0, eos_id=codec.eos_id, pad_id=codec.pad_id)
    return Policy(model, train_blocks=1, value_head=False)


def test_the_files_of_rollouts(tmp_path: Path, codec: Codec) -> None:
    rows = [Prompt((Turn("human", f"What is {n}?"),), f"It is {n}.", "") for n in range(7)]
    prompts = tokenize_prompts(rows, codec, 48, 9)
    (tmp_path / "handed").mkdir()
    path = hand_over_rollouts(
        *(tmp_path / "handed", policy(codec), codec, prompts, prompts, SECTION, 8, 1)
    )
    plan = json.loads(path.read_text())
    assert plan["algorithm"] == "grpo"
    # 3 prompts an iteration, 4 updates each: 2 iterations; the native engine's own rows.
    own = [batch_index(7, 3, 5, iteration).tolist() for iteration in range(2)]
    assert plan["order"] == own[0] + own[1]
    lines = [json.loads(line) for line in Path(plan["prompts"]).read_text().splitlines()]
    assert {line["index"] for line in lines} == set(plan["order"])
    assert all(line["ids"] == prompts.prompt[line["index"]].tolist() for line in lines)
    # Warm-up to the peak in 2 steps, then down to 0 at the end: (8 - step) / 6 of it.
    assert plan["rates"][:2] == [0.5, 1.0]
    assert plan["rates"][2:] == pytest.approx([(8 - step) / 6 for step in range(2, 8)])
    assert any(".1." in name for name in plan["trained"])
    assert not [name for name in plan["trained"] if ".0." in name or "embed" in name]
    assert len(Path(plan["validation"]).read_text().splitlines()) == 2
    assert (Path(plan["model"]) / "model.safetensors").is_file()


def test_the_files_of_pairs(tmp_path: Path, codec: Codec) -> None:
    rows = [
        Preference((Turn("human", f"What is {n}?"),), f"It is {n}.", "Go on.", "") for n in range(5)
    ]
    pairs = tokenize_preferences(rows, codec, 32)
    (tmp_path / "handed").mkdir()
    path = hand_over_pairs(
        *(tmp_path / "handed", policy(codec), codec, pairs, pairs, None, DPO, 3, 1)
    )
    plan = json.loads(path.read_text())
    lines = [json.loads(line) for line in Path(plan["pairs"]).read_text().splitlines()]
    own = np.concatenate([batch_index(5, 4, 5, step) for step in range(3)])
    for place, row in zip(plan["order"], own, strict=True):
        assert lines[place]["prompt_ids"] == pairs.prompt[row].tolist()
        assert lines[place]["chosen_ids"] == pairs.chosen[row].tolist()
        assert lines[place]["rejected_ids"] == pairs.rejected[row].tolist()
    assert len(Path(plan["validation_pairs"]).read_text().splitlines()) == 5
    assert Path(plan["validation"]).read_text() == "", "no prompts, no answers"
