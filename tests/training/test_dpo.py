"""DPO's task: what it starts from, what it learns, and that batches and processes do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_exp.config.training import DpoConfig, DpoLoss, GenerationConfig, Schedule, Select
from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPreferences
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.models.reference import build_reference
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.training.dpo import DpoTask, pair_logprobs, pair_micro_batches
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.result import Interrupted
from rlhf_exp.training.validation_answers import sample_answers
from tests.training.lab import EOS, LIKED, PAD, VOCABULARY, prompts, run_loop

SECTION = DpoConfig(
    seed=3,
    batch=4,
    lr=5e-3,
    schedule=Schedule.constant,
    select=Select.last,
    generation=GenerationConfig(batch=8),
)


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def pairs(count: int = 10, seed: int = 0) -> TokenizedPreferences:
    """Return pairs whose chosen response holds `LIKED`; of different lengths."""
    drawn = np.random.default_rng(seed)
    rows = [drawn.integers(8, VOCABULARY, size=3 + number % 3).tolist() for number in range(count)]
    plain = [drawn.integers(8, VOCABULARY, size=1 + number % 4).tolist() for number in range(count)]
    chosen = [[LIKED, *answer, EOS] for answer in plain]
    rejected = [[*answer, EOS] for answer in plain]
    return TokenizedPreferences(*map(RaggedArray.of, (rows, chosen, rejected)), 0, 0)


def build(
    world: World, section: DpoConfig = SECTION, train_blocks: int | None = 1, rank: int = 0
) -> DpoTask:
    """Return a task over a fresh random model, always the same."""
    shape = Architecture("gpt_neox", 2, 32, 2, 64, VOCABULARY, 64)
    model = build_causal_lm(shape, seed=5, eos_id=EOS, pad_id=PAD)
    lora = LoraSettings(rank) if rank else None
    policy = Policy(model, train_blocks=train_blocks, lora=lora, value_head=False, seed=1)
    reference = build_reference(policy)
    train, validation = pairs(), pairs(6, seed=1)
    found = [
        pair_logprobs(reference, side, np.arange(len(side)), section, world.device)
        for side in (train, validation)
    ]
    sampling = SamplingParams(6, 1.0, 8, EOS, PAD)
    asked = prompts(4)
    answered = (
        policy,
        reference,
        lambda batch: sample(model, batch, sampling, section.seed, None, None),
        asked,
        len(asked),
        section.generation,
        world,
    )

    def sampled(meters: MetricAccumulator) -> None:
        sample_answers(*answered, meters)

    return DpoTask(policy, train, found[0], validation, found[1], sampled, section, world)


def gradients(task: DpoTask) -> dict[str, Tensor]:
    def update(losses: Iterable[Tensor]) -> None:
        for loss in losses:
            loss.backward()

    task.iterate(0, update)
    named = task.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_log_probabilities_are_those_of_the_whole_model(world: World) -> None:
    """Summed over a response's tokens, its end-of-sequence token included."""
    task = build(world)
    held = task.validation
    found = task.validation_ref_logprobs
    for row in range(len(held)):
        for column, side in enumerate((held.chosen, held.rejected)):
            ids = [*held.prompt[row].tolist(), *side[row].tolist()]
            logits = task.module.model(input_ids=torch.tensor([ids])).logits[0]
            each = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            expected = each[len(held.prompt[row]) - 1 :].sum()
            assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "start"), [(DpoLoss.sigmoid, math.log(2)), (DpoLoss.ipo, 25.0), (DpoLoss.hinge, 1.0)]
)
def test_a_policy_begins_as_its_own_reference(world: World, loss: DpoLoss, start: float) -> None:
    """All margins are 0: ln 2; (1 / (2 * 0.1))^2; 1."""
    metrics = build(world, replace(SECTION, loss=loss)).evaluate().metrics
    assert metrics["eval/loss"] == pytest.approx(start, rel=1e-4)
    assert metrics["eval/margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["eval/kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert 1 <= metrics["eval/length_mean"] <= 6


@pytest.mark.parametrize("length_normalised", [False, True])
def test_it_learns_the_preference(world: World, tmp_path: Path, length_normalised: bool) -> None:
    section = replace(SECTION, length_normalised=length_normalised, beta=0.5)
    task = build(world, section)
    run = run_loop(world, tmp_path, steps=30, task=task, eval_every=30)
    metrics = task.evaluate().metrics
    assert metrics["eval/accuracy"] == 1.0  # of pairs it has not seen
    assert metrics["eval/reward_chosen"] > metrics["eval/reward_rejected"]
    assert metrics["eval/kl_sequence"] > 0.1
    rows = [row for row in run.tracker.rows if "dpo/accuracy" in row]
    assert rows[-1]["dpo/margin"] == pytest.approx(
        rows[-1]["dpo/reward_chosen"] - rows[-1]["dpo/reward_rejected"], abs=1e-5
    )
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]


def test_a_mean_over_tokens_is_the_sum_divided_by_their_number(world: World) -> None:
    """So the first gradient of a pair is that of the sums with each side's own divisor."""
    task = build(world, replace(SECTION, length_normalised=True))
    shifted = task.validation_ref_logprobs - torch.tensor([[6.0, 12.0]])
    task.validation_ref_logprobs = shifted
    metrics = task.evaluate().metrics
    sides = (task.validation.chosen, task.validation.rejected)
    chosen, rejected = (
        [shift / len(side[row]) for row in range(len(task.validation))]
        for side, shift in zip(sides, (6.0, 12.0), strict=True)
    )
    assert metrics["eval/reward_chosen"] == pytest.approx(0.1 * sum(chosen) / 6, rel=1e-3)
    assert metrics["eval/reward_rejected"] == pytest.approx(0.1 * sum(rejected) / 6, rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_does_not_change_the_gradient(world: World, size: int) -> None:
    whole = gradients(build(world))
    parts = gradients(build(world, replace(SECTION, micro_batch=size)))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-6), name


KINDS: dict[str, tuple[int | None, int]] = {"whole": (None, 0), "top": (1, 0), "lora": (None, 2)}
"""Training blocks, and the rank of an adapter."""


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_nothing_but_rounding(world: World, kind: str, size: int | None) -> None:
    blocks, rank = KINDS[kind]
    section = replace(SECTION, micro_batch=size, length_normalised=True)
    plain, packed = (
        build(world, replace(section, packing=packing, seq_length=24), blocks, rank)
        for packing in (False, True)
    )
    chosen = batch_index(len(packed.pairs), section.batch, section.seed, 0)
    parts = [
        len(pair_micro_batches(packed.pairs, chosen, task.section, size, world))
        for task in (plain, packed)
    ]
    assert parts == ([4, 2] if size else [1, 1]), "short pairs share a micro-batch"
    assert torch.allclose(plain.ref_logprobs, packed.ref_logprobs, atol=1e-5)
    ours, theirs = gradients(plain), gradients(packed)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-6), name
    assert any(value.abs().max() > 1e-4 for value in ours.values())
    # A move, so that there is a margin to compare.
    for task in (plain, packed):
        with torch.no_grad():
            for parameter in task.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    ours, theirs = plain.evaluate().metrics, packed.evaluate().metrics
    assert abs(ours["eval/margin"]) > 1e-4
    assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_resumed_equals_never_interrupted(world: World, tmp_path: Path, packing: bool) -> None:
    section = replace(SECTION, packing=packing)
    whole = run_loop(world, tmp_path / "whole", task=build(world, section))
    stop: Callable[[], bool] = lambda: True  # noqa: E731 - a name for what it means
    with pytest.raises(Interrupted):
        run_loop(world, tmp_path / "cut", task=build(world, section), interrupted=stop)
    resumed = run_loop(world, tmp_path / "cut", task=build(world, section))
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
