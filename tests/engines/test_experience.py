"""One iteration's experience and the loss on it: what counts, and with which sign."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_exp.algo.rewards import RewardScaler
from rlhf_exp.batch import Prompts, Rollouts, Samples
from rlhf_exp.data.order import batch_index
from rlhf_exp.distributed.world import Share, World, world_of
from rlhf_exp.engines.native.meters import Meters
from rlhf_exp.engines.native.ppo import PpoTask
from tests.engines.lab import EOS, LIKED, SETTINGS, build_task, prompts


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def responses(rollouts: Rollouts) -> list[list[int]]:
    spans = zip(
        rollouts.tokens.tolist(),
        rollouts.prompt_lengths.tolist(),
        rollouts.response_lengths.tolist(),
        strict=True,
    )
    return [row[start : start + length] for row, start, length in spans]


def test_rows_that_only_fill_up_a_batch_count_nowhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose share is filled up to 8 rows by 2 of weight 0 learns from 6."""
    plain, filled = Meters(world), Meters(world)
    real = replace(SETTINGS, rollouts=6)
    alone = build_task(world, real).collector.collect(0, plain)
    rows, weights = np.array([0, 1, 2, 3, 4, 5, 0, 1]), np.array([1.0] * 6 + [0.0] * 2)
    share = Share(rows, weights.astype(np.float32))
    monkeypatch.setattr(world, "share", lambda count, of=None: share)
    together = build_task(world, real).collector.collect(0, filled)
    assert not together.mask[6:].any()
    assert torch.equal(together.mask[:6], alone.mask)
    assert torch.allclose(together.advantages[:6], alone.advantages, atol=1e-6)
    assert together.advantages[6:].abs().max() == 0
    expected, found = plain.means(), filled.means()
    for name in expected.keys() - {"time/rollout_s", "time/score_s", "time/assess_s"}:
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name


def test_a_response_that_does_not_end_pays_the_penalty(world: World) -> None:
    """With gamma = lambda = 1, no scaling and KL 0, every return is the score itself."""
    collector = build_task(world).collector
    collector.settings = replace(collector.settings, lam=1.0, missing_eos_penalty=2.0)
    collector.scaler = RewardScaler("none")
    rollouts = collector.collect(0, Meters(world))
    expected = [
        float(said.count(LIKED)) - (0.0 if said[-1] == EOS else 2.0) for said in responses(rollouts)
    ]
    assert min(expected) < 0
    assert rollouts.returns[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_each_iteration_has_prompts_and_noise_of_its_own(world: World) -> None:
    task = build_task(world, replace(SETTINGS, rollouts=12))
    asked, numbers, sampler = [], [], task.collector.sampler

    def noted(batch: Prompts) -> Samples:
        numbers.append(batch.rollout.tolist())
        return sampler(batch)

    task.collector.sampler = noted
    for iteration in range(2):
        rollouts = task.collector.collect(iteration, Meters(world))
        lengths = rollouts.prompt_lengths.tolist()
        rows = rollouts.tokens.tolist()
        asked.append([tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)])
    for iteration in range(2):
        order = batch_index(12, 12, SETTINGS.seed, iteration)
        assert asked[iteration] == [tuple(prompts().prompt[row].tolist()) for row in order]
    assert asked[0] != asked[1]
    # The noise is a function of a rollout's number in the whole run.
    assert numbers == [list(range(12)), list(range(12, 24))]


def test_states_are_computed_again_where_those_of_decoding_are_not_to_be_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    task = build_task(world)
    trunk = task.collector.policy.trunk_states

    def counted(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return trunk(tokens)

    monkeypatch.setattr(task.collector.policy, "trunk_states", counted)
    task.collector.collect(0, Meters(world))
    assert calls == []
    task.collector.settings = replace(task.collector.settings, reuse_states=False)
    task.collector.collect(0, Meters(world))
    assert sum(calls) == SETTINGS.rollouts


def losses(task: PpoTask) -> dict[str, float]:
    """Return what is logged of one update on all rollouts."""
    task.accumulate(0, lambda loss: loss.backward())
    return task.metrics()


def test_the_loss_is_policy_plus_value_minus_entropy(world: World) -> None:
    """Before the first update the policy's entropy is that of the one that sampled."""
    once = replace(SETTINGS, epochs=1, batch=8)
    found = losses(build_task(world, replace(once, vf_coef=0.25, entropy_coef=0.5)))
    expected = found["loss/policy"] + 0.25 * found["loss/value"] - 0.5 * found["policy/entropy"]
    assert found["loss/total"] == pytest.approx(expected, abs=1e-5)
    assert found["policy/entropy"] > 1
    assert found["loss/value"] > 0.01


def test_every_epoch_shuffles_anew(world: World) -> None:
    task = build_task(world)
    orders = [
        tuple(
            row
            for number in range(task.settings.minibatches)
            for row in task._minibatch(iteration, epoch * task.settings.minibatches + number)
        )
        for iteration in range(2)
        for epoch in range(2)
    ]
    assert len(set(orders)) == 4
