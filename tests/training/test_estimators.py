"""RLOO, GRPO and REINFORCE++ in PPO's loop: groups, advantages, the penalty in the loss."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp.batch import Rollouts
from rlhf_exp.config.training import (
    AdvantageEstimator,
    GroupScale,
    KlConfig,
    KlEstimator,
    KlPlace,
    LossMean,
    PpoConfig,
)
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.ppo import PpoTask
from rlhf_exp.training.result import Interrupted
from tests.training.lab import LIKED, SECTION, build_task, run_loop

# Also for `two_processes.py`.
RLOO = replace(SECTION, advantage=AdvantageEstimator.rloo, samples_per_prompt=4)
GRPO = replace(
    SECTION,
    advantage=AdvantageEstimator.grpo,
    samples_per_prompt=4,
    loss_mean=LossMean.sequences,
    kl=KlConfig(where=KlPlace.loss, estimator=KlEstimator.k3, unbiased=False),
)
REINFORCE_PP = replace(SECTION, advantage=AdvantageEstimator.reinforce_pp)


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def collected(task: PpoTask, iteration: int = 0) -> Rollouts:
    return task.collector.collect(iteration, task.meters)


def liked(rollouts: Rollouts) -> list[float]:
    """Return the scores by the lab's reward, counted from the tokens."""
    spans = zip(
        rollouts.tokens.tolist(),
        rollouts.prompt_lengths.tolist(),
        rollouts.response_lengths.tolist(),
        strict=True,
    )
    return [float(row[start : start + length].count(LIKED)) for row, start, length in spans]


def groups(values: list[float], size: int = 4) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def scaled(task: PpoTask, scores: list[float]) -> list[float]:
    return [score / task.collector.scaler.moments.std for score in scores]


def test_a_group_answers_one_prompt_differently(world: World) -> None:
    rollouts = collected(build_task(world, RLOO))
    prompts = [
        tuple(row[:length])
        for row, length in zip(
            rollouts.tokens.tolist(), rollouts.prompt_lengths.tolist(), strict=True
        )
    ]
    first, second = prompts[:4], prompts[4:]
    assert len(set(first)) == 1
    assert len(set(second)) == 1
    assert first[0] != second[0]
    assert len({tuple(row) for row in rollouts.tokens[:4].tolist()}) > 1


def test_rloo_compares_each_response_with_the_others(world: World) -> None:
    """The policy is its own reference still, so a response's reward is its scaled score."""
    task = build_task(world, RLOO)
    rollouts = collected(task)
    scores = scaled(task, liked(rollouts))
    assert len(set(scores)) > 1
    expected = [
        score - statistics.mean(group[:place] + group[place + 1 :])
        for group in groups(scores)
        for place, score in enumerate(group)
    ]
    for row, advantage in enumerate(expected):
        length = int(rollouts.response_lengths[row])
        assert rollouts.advantages[row, :length].tolist() == pytest.approx([advantage] * length)
        assert not rollouts.advantages[row, length:].any()


@pytest.mark.parametrize("scale", list(GroupScale))
def test_grpo_goes_by_mean_and_standard_deviation(world: World, scale: GroupScale) -> None:
    task = build_task(world, replace(GRPO, grpo_scale=scale))
    rollouts = collected(task)
    expected = []
    for group in groups(scaled(task, liked(rollouts))):
        divisor = statistics.stdev(group) + 1e-4 if scale is GroupScale.std else 1.0
        expected += [(score - statistics.mean(group)) / divisor for score in group]
    assert rollouts.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_whitens_over_all_tokens(world: World) -> None:
    task = build_task(world, REINFORCE_PP)
    rollouts = collected(task)
    lengths = rollouts.response_lengths.tolist()
    scores = scaled(task, liked(rollouts))
    every = [score for score, length in zip(scores, lengths, strict=True) for _ in range(length)]
    mean, spread = statistics.mean(every), statistics.pstdev(every)
    expected = [(score - mean) / spread for score in scores]
    assert rollouts.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("section", [RLOO, GRPO, REINFORCE_PP], ids=["rloo", "grpo", "rpp"])
def test_nothing_of_a_value_function_is_left(world: World, section: PpoConfig) -> None:
    task = build_task(world, section)
    assert collected(task).values is None
    assert not any(name.startswith("value_") for name, _ in task.module.named_parameters())


def test_equal_rewards_are_counted(world: World) -> None:
    meters = MetricAccumulator(world)
    build_task(world, RLOO, scorer=constant).collector.collect(0, meters)
    found = meters.means()
    assert found["reward/group_equal_fraction"] == 1.0
    assert found["reward/group_std"] == 0.0


def constant(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
    return torch.full((len(tokens),), 0.25)


def test_the_loss_is_a_mean_of_sequences(world: World) -> None:
    """Before the first update every ratio is 1, so the loss is minus the mean advantage."""
    section = replace(REINFORCE_PP, epochs=1, batch=8, loss_mean=LossMean.sequences)
    task = build_task(world, section)
    rollouts = collected(task)
    means = [
        rollouts.advantages[row, : int(length)].mean().item()
        for row, length in enumerate(rollouts.response_lengths)
    ]
    assert len(set(rollouts.response_lengths.tolist())) > 1
    run_once(task)
    assert task.metrics()["loss/policy"] == pytest.approx(-statistics.mean(means), abs=1e-5)
    # By tokens it would be 0, for the advantages are whitened over them.
    assert abs(task.metrics()["loss/policy"]) > 1e-3


def run_once(task: PpoTask, iteration: int = 0) -> None:
    def update(losses: Iterator[Tensor]) -> None:
        for loss in losses:
            loss.backward()

    task.iterate(iteration, update)


def test_the_penalty_in_the_loss_pulls_back(world: World, tmp_path: Path) -> None:
    """Its value is beta times the divergence; the rewards are free of it."""
    task = build_task(world, replace(GRPO, epochs=1, batch=8))
    run_loop(world, tmp_path, task=task, steps=4)
    beta = task.collector.controller.coef
    run_once(task, iteration=4)
    found = task.metrics()
    # Sampled at the weights that it is measured at: the mean over responses of their mean k3.
    assert found["loss/kl"] > 1e-4
    expected = found["loss/policy"] + beta * found["loss/kl"]
    assert found["loss/total"] == pytest.approx(expected, abs=1e-6)


def test_with_the_penalty_in_the_loss_rewards_are_the_scores(world: World, tmp_path: Path) -> None:
    task = build_task(world, replace(GRPO, grpo_scale=GroupScale.none))
    run_loop(world, tmp_path, task=task, steps=12)
    rollouts = collected(task, 3)
    assert rollouts.ref_logprobs is not None
    assert not torch.allclose(rollouts.logprobs, rollouts.ref_logprobs, atol=1e-3)
    expected = []
    for group in groups(scaled(task, liked(rollouts))):
        expected += [score - statistics.mean(group) for score in group]
    assert rollouts.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("section", [RLOO, GRPO, REINFORCE_PP], ids=["rloo", "grpo", "rpp"])
def test_the_reward_rises(world: World, tmp_path: Path, section: PpoConfig) -> None:
    task = build_task(world, section)
    rows = run_loop(world, tmp_path, task=task, steps=80).tracker.rows
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


@pytest.mark.parametrize("section", [RLOO, GRPO, REINFORCE_PP], ids=["rloo", "grpo", "rpp"])
def test_resumed_equals_never_interrupted(world: World, tmp_path: Path, section: PpoConfig) -> None:
    whole = run_loop(world, tmp_path / "whole", task=build_task(world, section))
    with pytest.raises(Interrupted, match="step 4"):
        run_loop(world, tmp_path / "cut", task=build_task(world, section), interrupted=lambda: True)
    resumed = run_loop(world, tmp_path / "cut", task=build_task(world, section))
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
