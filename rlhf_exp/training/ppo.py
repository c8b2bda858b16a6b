"""Proximal policy optimisation against a reward, with a KL penalty to the initial policy.

An iteration samples `rollouts` responses (`experience.py`) and passes over them `epochs` times in
minibatches; each minibatch is one optimizer step of the shared loop. The run can stop and resume
between iterations.

Source: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (KL-penalised rewards for language models).

n rows of a minibatch in this process, T response tokens.

One iteration's experience: sample, score, assess, shape, estimate advantages.

B rollouts of this process, S tokens, T response tokens, D width.

What is reported of one iteration's experience.

B rollouts of this process, T response tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_exp.algo.advantages import RewardScaler, clip, delta, gae, shape_rewards, whiten
from rlhf_exp.algo.kl import KLController, k1, k3, sequence_kl
from rlhf_exp.algo.losses import entropy_bonus, policy_loss, value_loss
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Finish, Prompts, Rollouts, Samples
from rlhf_exp.data.batching import batch_index, epoch_permutation, prompts_batch
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.distributed.redistribute import redistribute, same_widths
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy, ResponseOutputs
from rlhf_exp.models.reference import Reference
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.optim import length_sorted_micro_batches
from rlhf_exp.training.reward_scorer import Scorer
from rlhf_exp.training.scorers import score_samples
from rlhf_exp.training.task import Evaluation


@dataclass(frozen=True)
class PpoSettings:
    """Sizes and coefficients of the updates.

    Attributes:
        rollouts: Responses an iteration, over all processes.
        batch: Rollouts of an optimizer step, over all processes.
        micro_batch: Rows of one forward; `None`: a process's whole share.
        epochs: Passes over an iteration's rollouts.
        clip_range: Clip range of the probability ratio.
        clip_range_value: Clip range of the value function.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        temperature: Of all log-probabilities.
        kl_stop: Stop above this sequence KL in nats; `None`: never.
        seed: Of the order of rollouts within an epoch.
    """

    rollouts: int
    batch: int
    micro_batch: int | None
    epochs: int
    clip_range: float
    clip_range_value: float
    vf_coef: float
    entropy_coef: float
    temperature: float
    kl_stop: float | None
    seed: int

    @property
    def minibatches(self) -> int:
        """Optimizer steps of one epoch; the last may be smaller."""
        return -(-self.rollouts // self.batch)

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return self.minibatches * self.epochs


class Evaluator(Protocol):
    """Evaluates the policy; what the first evaluation has found is kept, see `Validator`."""

    unit: float | None
    initial: list[float] | None

    def __call__(self) -> Evaluation:
        """Evaluate the policy as it is."""


class PpoTask:
    """What PPO brings to the loop.

    Args:
        policy: The policy, with its value head.
        collector: Makes each iteration's experience.
        evaluator: Answers validation prompts and scores the answers.
        settings: Sizes and coefficients.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        collector: ExperienceCollector,
        evaluator: Evaluator,
        settings: PpoSettings,
        world: World,
    ) -> None:
        self.module: nn.Module = policy
        self.collector, self.evaluator = collector, evaluator
        self.settings, self.world = settings, world
        self.meters = MetricAccumulator(world)
        self.rollouts: Rollouts | None = None
        self._forward: Callable[..., Any] = policy
        self._began = self._updating = 0.0

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper."""
        self._forward = wrapped

    def accumulate(self, step: int, backward: Callable[[Tensor], None]) -> None:
        """Compute the loss of one minibatch, collecting experience first where a new one begins."""
        iteration, update = divmod(step, self.settings.updates)
        if update == 0:
            self._began = time.perf_counter()
            with self.world.gathered():
                rollouts = self.collector.collect(iteration, self.meters)
            self.rollouts = same_widths(rollouts, self.world)
            self._updating = time.perf_counter()
        assert self.rollouts is not None, "a run resumes at the beginning of an iteration"
        chosen = self._minibatch(iteration, update)
        minibatch = redistribute(self.rollouts, chosen, self.world)
        real = torch.from_numpy(self.world.share(len(chosen)).weights) > 0
        mask = minibatch.mask & real[:, None].to(self.world.device)
        minibatch = replace(minibatch, mask=mask)
        normaliser = self.world.sum(mask.sum().double()).float()
        lengths = (minibatch.prompt_lengths + minibatch.response_lengths).cpu()
        parts = length_sorted_micro_batches(lengths, self.settings.micro_batch)
        for part in self.world.micro_batches(parts):
            longest = int(lengths[part].max())
            backward(self._loss(minibatch.select(part), longest, normaliser, update == 0))

    def _minibatch(self, iteration: int, update: int) -> np.ndarray:
        """Return the numbers of a minibatch's rows among all processes' rollouts."""
        settings = self.settings
        epoch, number = divmod(update, settings.minibatches)
        order = epoch_permutation(
            settings.rollouts, settings.seed, iteration * settings.epochs + epoch
        )
        return order[number * settings.batch : (number + 1) * settings.batch]

    def _loss(self, batch: Rollouts, longest: int, normaliser: Tensor, first: bool) -> Tensor:
        """Return this micro-batch's part of the minibatch's loss (0-dim)."""
        settings = self.settings
        width = int(batch.response_lengths.max())
        mask = batch.mask[:, :width]
        states = None if batch.states is None else batch.states[:, :longest]
        with self.world.autocast():
            outputs: ResponseOutputs = self._forward(
                tokens=batch.tokens[:, :longest],
                prompt_lengths=batch.prompt_lengths,
                response_lengths=batch.response_lengths,
                temperature=settings.temperature,
                states=None if states is None else states.to(self.world.device),
                with_entropy=settings.entropy_coef > 0.0,
                width=width,
            )
        policy, policy_stats = policy_loss(
            outputs.logprobs,
            batch.logprobs[:, :width],
            batch.advantages[:, :width],
            mask,
            settings.clip_range,
            normaliser,
        )
        value, value_stats = value_loss(
            outputs.values,
            batch.values[:, :width],
            batch.returns[:, :width],
            mask,
            settings.clip_range_value,
            normaliser,
        )
        loss = policy + settings.vf_coef * value
        if outputs.entropy is not None:
            loss = loss - settings.entropy_coef * entropy_bonus(outputs.entropy, mask, normaliser)
        count = policy_stats.count
        share = count / normaliser
        self.meters.add("loss/total", loss, share)
        self.meters.add("loss/policy", policy, share)
        self.meters.add("loss/value", value, share)
        self.meters.add("policy/clip_fraction", policy_stats.clipped, count)
        self.meters.add("policy/approx_kl", policy_stats.approx_kl, count)
        self.meters.extreme("policy/ratio_max", policy_stats.ratio_max, largest=True)
        self.meters.add("value/clip_fraction", value_stats.clipped, count)
        if first:
            # Away from 1 here, sampling and training would not see the same policy.
            self.meters.extreme("policy/ratio_first", policy_stats.ratio_max, largest=True)
        return loss

    def at_boundary(self, step: int) -> bool:
        """Between iterations: the rollouts of the next one depend on nothing but the weights."""
        return step % self.settings.updates == 0

    def metrics(self) -> dict[str, float]:
        """Return the iteration's means, and let the KL controller react to them."""
        now = time.perf_counter()
        count = self.settings.rollouts
        self.meters.add("time/update_s", now - self._updating, 1.0)
        found = self.meters.means()
        elapsed = now - self._began
        found["throughput/samples_per_s"] = count / elapsed
        found["throughput/tokens_per_s"] = count * found["response/length_mean"] / elapsed
        self.collector.controller.update(found["kl/sequence"], count)
        self.rollouts = None
        return found

    def distributions(self) -> dict[str, list[float]]:
        """Return the iteration's raw scores and its KL by response."""
        return self.meters.distributions()

    def evaluate(self) -> Evaluation:
        """Answer validation prompts and score the answers."""
        with self.world.gathered():
            return self.evaluator()

    def state(self) -> dict[str, Any]:
        """Return the KL coefficient, the moments of the scores, and the first evaluation's."""
        return {
            "controller": self.collector.controller.state_dict(),
            "scaler": self.collector.scaler.state_dict(),
            "unit": self.evaluator.unit,
            "initial": self.evaluator.initial,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.evaluator.unit, self.evaluator.initial = state["unit"], state["initial"]
        self.collector.controller.load_state_dict(state["controller"])
        self.collector.scaler.load_state_dict(state["scaler"])

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""
        for name in ("loss/total", "kl/sequence", "reward/mean"):
            if not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        limit = self.settings.kl_stop
        if limit is not None and metrics["kl/sequence"] > limit:
            return f"kl/sequence is {metrics['kl/sequence']:.3g}, above ppo.kl.stop={limit:g}"
        return None


Sampler = Callable[[Prompts], Samples]


@dataclass(frozen=True)
class ExperienceSettings:
    """How rollouts become rewards and advantages.

    Attributes:
        rollouts: Responses an iteration, over all processes.
        temperature: Of sampling and of all log-probabilities.
        gamma: Discount a token.
        lam: Lambda of GAE.
        reward_clip: Scores are clipped to plus or minus this; `None`: not.
        missing_eos_penalty: Subtracted from the score of a response that did not end.
        batch: Rows of a forward pass without gradients.
        reuse_states: Whether the states captured while decoding serve the training passes; else
            one trunk forward computes them again.
        seed: Of the order of prompts.
    """

    rollouts: int
    temperature: float
    gamma: float
    lam: float
    reward_clip: float | None
    missing_eos_penalty: float
    batch: int
    reuse_states: bool
    seed: int


@dataclass(frozen=True)
class PolicyOutputs:
    """What policy and reference say of an iteration's responses.

    Attributes:
        logprobs: [B, T] float32 of the policy.
        values: [B, T] float32.
        entropy: [B, T] float32, nats.
        ref_logprobs: [B, T] float32 of the reference.
        states: [B, S, D] or `None`.
    """

    logprobs: Tensor
    values: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    states: Tensor | None


class ExperienceCollector:
    """Makes experience.

    Args:
        policy: The policy.
        reference: The frozen reference.
        sampler: Answers prompts.
        scorer: Scores responses.
        prompts: The training prompts.
        original_scores: [prompts] float32, the scores of the data set's own responses, or `None`
            if they are not subtracted.
        scaler: Scales scores, with its running moments.
        controller: The weight of the KL penalty.
        settings: The rest.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        sampler: Sampler,
        scorer: Scorer,
        prompts: TokenizedPrompts,
        original_scores: Tensor | None,
        scaler: RewardScaler,
        controller: KLController,
        settings: ExperienceSettings,
        world: World,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.sampler, self.scorer = sampler, scorer
        self.prompts, self.original_scores = prompts, original_scores
        self.scaler, self.controller = scaler, controller
        self.settings, self.world = settings, world

    def collect(self, iteration: int, meters: MetricAccumulator) -> Rollouts:
        """Sample, score and assess one iteration's rollouts, and report on them."""
        began = time.perf_counter()
        samples, weights = self._sample(iteration)
        sampled = time.perf_counter()
        scores = self._score(samples, weights, meters)
        scored = time.perf_counter()
        assessed = self._assess(samples)
        rollouts = self._estimate(samples, weights, scores, assessed, meters)
        report_responses(samples, weights, meters)
        meters.add("time/rollout_s", sampled - began, 1.0)
        meters.add("time/score_s", scored - sampled, 1.0)
        meters.add("time/assess_s", time.perf_counter() - scored, 1.0)
        return rollouts

    def _sample(self, iteration: int) -> tuple[Samples, Tensor]:
        count = self.settings.rollouts
        chosen = batch_index(len(self.prompts), count, self.settings.seed, iteration)
        share = self.world.share(count)
        numbers = np.arange(iteration * count, (iteration + 1) * count)
        batch = prompts_batch(self.prompts, chosen[share.rows], numbers[share.rows])
        samples = self.sampler(batch.to(self.world.device))
        return samples, torch.from_numpy(share.weights).to(self.world.device)

    def _score(self, samples: Samples, weights: Tensor, meters: MetricAccumulator) -> Tensor:
        """Return what goes into the reward: [B] float32, penalised, compared, clipped, scaled."""
        settings, device = self.settings, self.world.device
        raw = score_samples(self.scorer, samples).to(device)
        report_scores(raw, weights, meters)
        scores = raw - settings.missing_eos_penalty * (samples.finish == Finish.LENGTH)
        if self.original_scores is not None:
            scores = delta(scores, self.original_scores[samples.index.cpu()].to(device))
            meters.add("reward/delta_mean", (scores * weights).sum(), weights.sum())
        if settings.reward_clip is not None:
            scores = clip(scores, settings.reward_clip)
        scaled = self.scaler.scale(scores, self.world.gather(scores[weights > 0]))
        meters.add("reward/scale", self.scaler.moments.std, 1.0)
        return scaled

    @torch.no_grad()
    def _assess(self, samples: Samples) -> PolicyOutputs:
        """Run policy and reference over all responses, with the states that training will use."""
        rows, width = len(samples), int(samples.response_lengths.max())
        results = [torch.zeros(rows, width, device=self.world.device) for _ in range(4)]
        states = self._given_states(samples)
        keep = states
        lengths = (samples.prompt_lengths + samples.response_lengths).cpu()
        for part in length_sorted_micro_batches(lengths, self.settings.batch):
            longest = int(lengths[part].max())
            tokens = samples.tokens[part, :longest]
            with self.world.autocast():
                given = None if states is None else states[part, :longest].to(self.world.device)
                if given is None and self.policy.cut is not None:
                    given = self.policy.trunk_states(tokens)
                    if keep is None:
                        keep = given.new_zeros(rows, samples.tokens.shape[1], given.shape[2])
                    keep[part, :longest] = given
                spans = (samples.prompt_lengths[part], samples.response_lengths[part])
                outputs = self.policy.response_outputs(
                    tokens=tokens,
                    prompt_lengths=spans[0],
                    response_lengths=spans[1],
                    temperature=self.settings.temperature,
                    states=given,
                    with_entropy=True,
                    width=width,
                )
                expected = self.reference.logprobs(
                    tokens, *spans, self.settings.temperature, states=given, width=width
                )
            assert outputs.entropy is not None
            found = (outputs.logprobs, outputs.values, outputs.entropy, expected)
            for result, value in zip(results, found, strict=True):
                result[part] = value.float()
        logprobs, values, entropy, ref_logprobs = results
        return PolicyOutputs(logprobs, values, entropy, ref_logprobs, keep)

    def _given_states(self, samples: Samples) -> Tensor | None:
        usable = self.settings.reuse_states and self.policy.cut is not None
        return samples.states if usable else None

    def _estimate(
        self,
        samples: Samples,
        weights: Tensor,
        scores: Tensor,
        found: PolicyOutputs,
        meters: MetricAccumulator,
    ) -> Rollouts:
        settings = self.settings
        mask = response_mask(samples.response_lengths, found.logprobs.shape[1])
        mask = mask & (weights > 0)[:, None]
        beta = self.controller.coef
        rewards = shape_rewards(scores, found.logprobs, found.ref_logprobs, mask, beta)
        advantages, returns = gae(rewards, found.values, mask, settings.gamma, settings.lam)
        mean, std = moments(advantages, mask, self.world)
        report_kl(found.logprobs, found.ref_logprobs, found.entropy, mask, weights, meters)
        meters.add("kl/beta", beta, 1.0)
        report_values(found.values, returns, mask, meters, self.world)
        return Rollouts(
            tokens=samples.tokens,
            prompt_lengths=samples.prompt_lengths,
            response_lengths=samples.response_lengths,
            mask=mask,
            logprobs=found.logprobs,
            values=found.values,
            advantages=whiten(advantages, mask, mean, std),
            returns=returns,
            weights=weights,
            states=found.states,
        )


def report_scores(raw: Tensor, weights: Tensor, meters: MetricAccumulator) -> None:
    """Report the raw scores [B]."""
    meters.add("reward/mean", (raw * weights).sum(), weights.sum())
    meters.spread("reward/std", raw, weights)
    meters.keep("reward/histogram", raw, weights)
    without = weights == 0  # perhaps all rows of this process
    meters.extreme("reward/min", raw.masked_fill(without, math.inf).min(), largest=False)
    meters.extreme("reward/max", raw.masked_fill(without, -math.inf).max(), largest=True)


def report_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor,
    weights: Tensor,
    meters: MetricAccumulator,
) -> None:
    """Report divergence and entropy of one iteration."""
    tokens = mask.sum()
    for name, estimator in (("kl/k1", k1), ("kl/k3", k3)):
        values = estimator(logprobs, ref_logprobs)
        meters.add(name, (values * mask).sum(), tokens)
    whole = sequence_kl(logprobs, ref_logprobs, mask)
    meters.keep("kl/histogram", whole, weights)
    meters.add("kl/sequence", (whole * weights).sum(), weights.sum())
    meters.add("policy/entropy", (entropy * mask).sum(), tokens)


def report_values(
    values: Tensor, returns: Tensor, mask: Tensor, meters: MetricAccumulator, world: World
) -> None:
    """Report mean and explained variance of the values [B, T]."""
    meters.add("value/mean", (values * mask).sum(), mask.sum())
    residual = moments(returns - values, mask, world)[1].square()
    total = moments(returns, mask, world)[1].square()
    meters.add("value/explained_variance", 1.0 - residual / total.clamp_min(1e-8), 1.0)


def report_responses(samples: Samples, weights: Tensor, meters: MetricAccumulator) -> None:
    """Report lengths and how responses ended."""
    count = weights.sum()
    lengths = (samples.response_lengths * weights).sum()
    meters.add("response/length_mean", lengths, count)
    for name, reason in (("eos", Finish.EOS), ("stop", Finish.STOP)):
        ended = ((samples.finish == reason) * weights).sum()
        meters.add(f"response/{name}_fraction", ended, count)


def moments(values: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of masked values over all processes."""
    count = world.sum(mask.sum().double())
    mean = world.sum((values.double() * mask).sum()) / count
    variance = world.sum(((values.double() - mean).square() * mask).sum()) / count
    return mean.float(), variance.sqrt().float()
