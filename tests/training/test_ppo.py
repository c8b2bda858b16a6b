"""PPO's engine: what the first minibatch sees, accumulation, minibatches, resume.

One iteration's experience and the loss on it: what counts, and with which sign.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_exp.algo.advantages import RewardScaler
from rlhf_exp.batch import Prompts, Rollouts, Samples
from rlhf_exp.config.training import GenerationConfig, KlConfig, Select
from rlhf_exp.data.batching import batch_index, prompts_batch
from rlhf_exp.distributed.world import RowShare, World, world_of
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.optim import build_optimizer
from rlhf_exp.training.ppo import ExperienceCollector, PpoTask
from rlhf_exp.training.result import Diverged, Interrupted
from rlhf_exp.training.task import Update
from tests.training.lab import (
    EOS,
    LIKED,
    PAD,
    SECTION,
    Evaluations,
    build_task,
    count_liked,
    prompts,
    run_loop,
)


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def gradients(task: PpoTask, step: int) -> dict[str, Tensor]:
    """Return the gradients of one optimizer step of the first iteration; no step is taken."""
    found: list[dict[str, Tensor]] = []

    def update(losses: Iterable[Tensor]) -> None:
        task.module.zero_grad()
        for loss in losses:
            loss.backward()
        named = task.module.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    task.iterate(0, update)
    return found[step]


@pytest.mark.parametrize(("train_blocks", "temperature"), [(1, 1.0), (None, 1.0), (1, 0.7)])
def test_first_minibatch_has_ratio_1_and_no_divergence(
    world: World, train_blocks: int | None, temperature: float
) -> None:
    section = replace(
        SECTION, epochs=1, batch=8, generation=GenerationConfig(temperature=temperature, batch=8)
    )
    task = build_task(world, section, train_blocks=train_blocks)
    gradients(task, 0)
    found = task.metrics()
    assert found["policy/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert found["policy/clip_fraction"] == 0.0
    # The policy is its own reference still.
    assert found["kl/sequence"] == pytest.approx(0.0, abs=1e-4)
    assert found["kl/k3"] == pytest.approx(0.0, abs=1e-6)


def test_training_states_are_the_decoders(world: World) -> None:
    """Log-probs over the states kept from decoding equal those of the sampler."""
    task = build_task(world)
    rollouts = task.collector.collect(0, MetricAccumulator(world))
    again = task.collector.sampler(_first_batch())
    assert rollouts.states is not None
    assert torch.allclose(rollouts.logprobs, again.logprobs, atol=1e-4)
    recomputed = build_task(world, capture=False)
    other = recomputed.collector.collect(0, MetricAccumulator(world))
    assert torch.allclose(rollouts.logprobs, other.logprobs, atol=1e-4)
    assert torch.allclose(rollouts.advantages, other.advantages, atol=1e-3)


def _first_batch() -> Prompts:
    index = batch_index(12, SECTION.rollouts, SECTION.seed, 0)
    return prompts_batch(prompts(), index, np.arange(SECTION.rollouts))


@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_does_not_change_the_gradient(world: World, size: int) -> None:
    whole = gradients(build_task(world), 0)
    parts = gradients(build_task(world, replace(SECTION, micro_batch=size)), 0)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-6), name


def test_only_the_top_block_trains(world: World) -> None:
    names = gradients(build_task(world, train_blocks=1), 0).keys()
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.0." in name or "embed_in" in name for name in names)


def test_each_epoch_uses_every_rollout_once(world: World) -> None:
    """Also where rollouts do not divide by the batch: 8 rollouts, batches of 3 are 3, 3, 2."""
    task = build_task(world, replace(SECTION, batch=3))
    assert task.updates == 6
    drawn = list(task.minibatches(0))
    for epoch in range(2):
        rows = [drawn[epoch * 3 + number].tolist() for number in range(3)]
        assert [len(part) for part in rows] == [3, 3, 2]
        assert sorted(functools.reduce(operator.iadd, rows, [])) == list(range(8))


def test_delta_subtracts_the_originals_score(world: World) -> None:
    """Every original scores 1 (one liked token), so the delta is the raw mean less 1."""
    task = build_task(world, originals=torch.ones(12))
    gradients(task, 0)
    found = task.metrics()
    assert found["reward/delta_mean"] == pytest.approx(found["reward/mean"] - 1.0, abs=1e-6)


def test_controller_moves_once_an_iteration_by_all_rollouts(world: World) -> None:
    """KL 0 against a target of 1: error -1, clipped to -0.2; beta *= 1 - 0.2 * 8 / 100."""
    task = build_task(world)
    gradients(task, 0)
    task.metrics()
    assert task.collector.controller.coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100), rel=1e-3)


def test_reward_rises(world: World, tmp_path: Path) -> None:
    rows = run_loop(world, tmp_path, steps=80).tracker.rows
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_the_learning_rate_follows_its_schedule(world: World, tmp_path: Path) -> None:
    """12 steps, 2 of warm-up, then linear to 0: step s has 5e-3 (1 - (s - 2) / 10); 4 a row."""
    rows = run_loop(world, tmp_path).tracker.rows
    rates = [row["optim/lr"] for row in rows if "optim/lr" in row]
    assert rates == pytest.approx([5e-3 * 0.9, 5e-3 * 0.5, 5e-3 * 0.1])


def test_every_documented_metric_is_logged(world: World, tmp_path: Path) -> None:
    row = next(
        one
        for one in run_loop(
            world, tmp_path, task=build_task(world, originals=torch.zeros(12))
        ).tracker.rows
        if "reward/mean" in one
    )
    groups = {
        "reward": "mean std min max delta_mean",
        "kl": "k1 k3 sequence beta",
        "loss": "total policy value",
        "policy": "entropy clip_fraction approx_kl ratio_max",
        "value": "mean explained_variance clip_fraction",
        "response": "length_mean eos_fraction stop_fraction",
        "optim": "lr grad_norm",
        "time": "rollout_s score_s update_s",
        "throughput": "samples_per_s tokens_per_s",
        "memory": "peak_bytes",
    }
    for group, names in groups.items():
        for name in names.split():
            assert math.isfinite(row[f"{group}/{name}"]), f"{group}/{name}"
    assert row["loss/total"] == pytest.approx(row["loss/policy"] + row["loss/value"], rel=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stop_at", [1, 5, 8, 11])
def test_killed_and_resumed_equals_never_interrupted(
    world: World, tmp_path: Path, stop_at: int, ahead: bool
) -> None:
    """Dies inside optimizer step `stop_at`; the lost iteration is replayed, bit for bit."""
    section = replace(SECTION, steps=12)
    whole = run_loop(world, tmp_path / "whole", task=build_task(world, section, ahead=ahead))

    class Killed(Exception):
        pass

    task = build_task(world, section, ahead=ahead)
    iterate = task.iterate

    def dying(iteration: int, update: Update) -> None:
        steps = itertools.count(iteration * task.updates)

        def counted(losses: Iterable[Tensor]) -> None:
            if next(steps) == stop_at:
                for loss in losses:
                    loss.backward()
                raise Killed
            update(losses)

        iterate(iteration, counted)

    task.iterate = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run_loop(world, tmp_path / "cut", task=task)
    again = build_task(world, section, ahead=ahead)
    again.evaluator = Evaluations(range(5, 1000))
    resumed = run_loop(world, tmp_path / "cut", task=again)
    assert resumed.outcome is not None
    assert resumed.outcome.steps_run == 12 - stop_at // 4 * 4
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    # The unit of the first evaluation, 2 + 0, unless there was no checkpoint to take it from.
    assert resumed.task.evaluator.unit == (2.0 if stop_at >= 4 else 7.0)
    assert resumed.task.evaluator.initial == [0.0 if stop_at >= 4 else 5.0, 0.1]
    assert whole.task.collector.controller.coef == resumed.task.collector.controller.coef
    last = [
        [row["reward/mean"] for row in run.tracker.rows if "reward/mean" in row][-1]
        for run in (whole, resumed)
    ]
    assert last[0] == last[1]


NEXT = RolloutRequest(SamplingParams(6, SECTION.generation.temperature, 8, EOS, PAD), SECTION.seed)


def test_an_iteration_ahead_is_sampled_from_the_weights_before_the_updates(world: World) -> None:
    """The second iteration's responses are the first policy's; the third's, those of the second."""
    task = build_task(world, replace(SECTION, steps=12), ahead=True)
    task.attach(world.prepare(task.module, lambda: build_optimizer(task.module, SECTION), 1.0))
    collector = task.collector
    expected: list[Tensor] = []
    taken: list[Tensor] = []
    take = collector.ahead.take  # type: ignore[union-attr]

    def noted(iteration: int) -> Samples | None:
        samples = take(iteration)
        if samples is not None:
            taken.append(samples.tokens)
        return samples

    collector.ahead.take = noted  # type: ignore[method-assign, union-attr]
    for iteration in range(3):
        # The policy's own weights, now, answer what is next.
        answer = partial(NativeEngine(task.module).answer, request=NEXT)  # type: ignore[arg-type]
        expected.append(answer(collector._prompts(iteration + 1)).tokens)

        def update(losses: Iterable[Tensor]) -> None:
            for loss in losses:
                world.backward(loss)
            world.strategy.step()

        task.iterate(iteration, update)
    assert collector.ahead.take(3) is None  # type: ignore[union-attr] # there is no fourth
    assert len(taken) == 2
    assert all(torch.equal(*pair) for pair in zip(taken, expected, strict=False))
    assert not torch.equal(taken[0], taken[1])


def test_interrupt_saves_at_the_next_boundary(world: World, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="step 4"):
        run_loop(world, tmp_path, interrupted=lambda: True, checkpoint_every=100)
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_loop(world, tmp_path)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000012"
    content = bytearray((newest / "trainable.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "trainable.safetensors").write_bytes(content)
    again = run_loop(world, tmp_path)
    assert "falling back" in caplog.text
    assert again.outcome is not None
    assert again.outcome.steps_run == 4
    for name, value in whole.weights.items():
        assert torch.equal(value, again.weights[name]), name


def test_not_a_number_stops_with_the_checkpoint_kept(world: World, tmp_path: Path) -> None:
    calls = iter(range(1000))

    def breaking(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        scores = count_liked(tokens, prompt_lengths, content_lengths)
        return scores * float("nan") if next(calls) == 2 else scores

    with pytest.raises(Diverged, match="learning rate"):
        run_loop(world, tmp_path, task=build_task(world, scorer=breaking))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]


def test_kl_limit_stops(world: World, tmp_path: Path) -> None:
    task = build_task(world, replace(SECTION, kl=KlConfig(stop=1e-3)))
    with pytest.raises(Diverged, match=r"ppo\.kl\.stop=0\.001"):
        run_loop(world, tmp_path, task=task)


def test_best_weights_are_published(world: World, tmp_path: Path) -> None:
    """The lab's evaluations get better each time, so one turned worse must lose to it."""
    task = build_task(world)
    task.evaluator = Evaluations([0.0, 5.0, 1.0, 2.0])
    run = run_loop(world, tmp_path, task=task, select=Select.best)
    assert run.outcome is not None
    assert (run.outcome.published_step, run.outcome.objective) == (4, 5.0)
    early = run_loop(world, tmp_path / "short", steps=12)
    assert not all(torch.equal(run.weights[n], early.weights[n]) for n in run.weights)


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
    plain, filled = MetricAccumulator(world), MetricAccumulator(world)
    real = replace(SECTION, rollouts=6)
    alone = build_task(world, real).collector.collect(0, plain)
    rows, weights = np.array([0, 1, 2, 3, 4, 5, 0, 1]), np.array([1.0] * 6 + [0.0] * 2)
    share = RowShare(rows, weights.astype(np.float32))
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
    reward = replace(SECTION.reward, missing_eos_penalty=2.0)
    collector.section = replace(SECTION, lam=1.0, reward=reward)
    collector.scaler = RewardScaler("none")
    rollouts = collector.collect(0, MetricAccumulator(world))
    expected = [
        float(said.count(LIKED)) - (0.0 if said[-1] == EOS else 2.0) for said in responses(rollouts)
    ]
    assert min(expected) < 0
    assert rollouts.returns is not None
    assert rollouts.returns[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_scores_that_differ_by_rounding_are_not_divided(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def a_tenth(tokens: Tensor, *lengths: Tensor) -> Tensor:
        return torch.full((len(tokens),), 0.1) + 7e-9 * (torch.arange(len(tokens)) % 2)

    assert len(a_tenth(torch.zeros(8, 1)).unique()) == 2
    collector = build_task(world, scorer=a_tenth).collector
    meters = MetricAccumulator(world)
    rollouts = collector.collect(0, meters)
    collector.collect(1, meters)
    assert meters.means()["reward/scale"] == 1.0
    assert rollouts.returns is not None
    assert rollouts.returns.abs().max() < 1.0
    assert len(caplog.messages) == 1, "said once"
    # Half of them are 7.45e-9 above the others: 3.7e-9 from their mean.
    assert re.search(r"rounding \(about 0\.1, standard deviation (3\.[789]|4)e-09", caplog.text)


def test_each_iteration_has_prompts_and_noise_of_its_own(world: World) -> None:
    task = build_task(world, replace(SECTION, rollouts=12))
    asked, numbers, sampler = [], [], task.collector.sampler

    def noted(batch: Prompts) -> Samples:
        numbers.append(batch.rollout.tolist())
        return sampler(batch)

    task.collector.sampler = noted
    for iteration in range(2):
        rollouts = task.collector.collect(iteration, MetricAccumulator(world))
        lengths = rollouts.prompt_lengths.tolist()
        rows = rollouts.tokens.tolist()
        asked.append([tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)])
    for iteration in range(2):
        order = batch_index(12, 12, SECTION.seed, iteration)
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
    task.collector.collect(0, MetricAccumulator(world))
    assert calls == []
    task.collector.sampler = build_task(world, capture=False).collector.sampler
    task.collector.collect(0, MetricAccumulator(world))
    assert sum(calls) == SECTION.rollouts


def losses(task: PpoTask) -> dict[str, float]:
    """Return what is logged of one update on all rollouts."""
    gradients(task, 0)
    return task.metrics()


def test_the_loss_is_policy_plus_value_minus_entropy(world: World) -> None:
    """Before the first update the policy's entropy is that of the one that sampled."""
    once = replace(SECTION, epochs=1, batch=8)
    found = losses(build_task(world, replace(once, vf_coef=0.25, entropy_coef=0.5)))
    expected = found["loss/policy"] + 0.25 * found["loss/value"] - 0.5 * found["policy/entropy"]
    assert found["loss/total"] == pytest.approx(expected, abs=1e-5)
    assert found["policy/entropy"] > 1
    assert found["loss/value"] > 0.01


def test_every_epoch_shuffles_anew(world: World) -> None:
    task = build_task(world)
    orders = []
    for iteration in range(2):
        first, second, third, fourth = (rows.tolist() for rows in task.minibatches(iteration))
        orders += [(*first, *second), (*third, *fourth)]
    assert len(set(orders)) == 4


def shifted(collector: ExperienceCollector, gap: float) -> None:
    """Let the sampler say that it found every second token less likely by `gap` than it did."""
    honest = collector.sampler

    def sampler(batch: Prompts) -> Samples:
        samples = honest(batch)
        changed = samples.logprobs.clone()
        changed[:, ::2] -= gap
        return replace(samples, logprobs=changed)

    collector.sampler = sampler


def test_advantages_are_weighted_by_policy_over_sampler(world: World) -> None:
    plain = build_task(world).collector.collect(0, MetricAccumulator(world))
    meters = MetricAccumulator(world)
    collector = build_task(world).collector
    collector.correction = 2.0
    shifted(collector, math.log(1.5))
    corrected = collector.collect(0, meters)
    # Weights of 1.5 and 1 in turn; everything else is as it was.
    assert torch.allclose(corrected.advantages[:, ::2], 1.5 * plain.advantages[:, ::2], atol=1e-5)
    assert torch.allclose(corrected.advantages[:, 1::2], plain.advantages[:, 1::2], atol=1e-5)
    assert torch.equal(corrected.logprobs, plain.logprobs)
    assert plain.returns is not None
    assert corrected.returns is not None
    assert torch.equal(corrected.returns, plain.returns)
    found = meters.means()
    even, tokens = float(plain.mask[:, ::2].sum()), float(plain.mask.sum())
    share = even / tokens
    assert found["rollout/logprob_gap_mean"] == pytest.approx(share * math.log(1.5), abs=1e-5)
    assert found["rollout/logprob_gap_max"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert found["rollout/weight_max"] == pytest.approx(1.5, abs=1e-5)
    # k3 of the gap g = ln 1.5 is 0.5 - ln 1.5, and 0 of none.
    assert found["rollout/kl"] == pytest.approx(share * (0.5 - math.log(1.5)), abs=1e-5)
    mean, square = (1.5 * even + tokens - even) / tokens, (2.25 * even + tokens - even) / tokens
    assert found["rollout/ess"] == pytest.approx(mean**2 / square, abs=1e-5)


def test_a_weight_is_cut_and_no_correction_changes_nothing(world: World) -> None:
    plain = build_task(world).collector.collect(0, MetricAccumulator(world))
    found = []
    for correction in (None, 3.0):
        collector = build_task(world).collector
        collector.correction = correction
        shifted(collector, math.log(8.0))
        found.append(collector.collect(0, MetricAccumulator(world)))
    uncorrected, corrected = found
    assert torch.equal(uncorrected.advantages, plain.advantages)
    assert torch.allclose(corrected.advantages[:, ::2], 3.0 * plain.advantages[:, ::2], atol=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
def test_handing_over_weights_and_waiting_for_responses_are_time_of_sampling(
    world: World, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_task(world, ahead=ahead)
    refresh = task.engine.refresh

    def slow(version: int) -> None:
        time.sleep(0.3)
        refresh(version)

    def update(losses: Iterable[Tensor]) -> None:
        assert len(list(losses)) == 1

    monkeypatch.setattr(task.engine, "refresh", slow)
    task.iterate(0, update)
    assert 0.3 <= task.metrics()["time/rollout_s"] < 10.0
