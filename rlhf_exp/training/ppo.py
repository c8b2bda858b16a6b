"""Proximal policy optimisation against a reward, with a KL penalty to the initial policy.

One iteration is `PpoTask.iterate`: collect experience, then learn from it.

1. Sample responses y ~ pi(.|x) to the next prompts.
2. Score them: r(x, y), from the reward model or the user's own scorer.
3. One forward of policy and reference over all responses: log pi, V, log pi_ref.
4. Rewards of tokens: r_t = -beta (log pi_t - log pi_ref,t), plus the score at the last token.
5. Advantages A_t by GAE, returns R_t = A_t + V_t; the advantages are whitened.
   A sampler that is not quite the policy has each token's A_t weighted by min(C, pi / pi_sampler).
6. `epochs` passes over the rollouts in minibatches, an optimizer step each, on
   L = -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + vf_coef L_V - entropy_coef H,
   with the ratio rho = pi_new / pi.
7. The KL controller sets beta for the next iteration.

With `advantage: rloo | grpo | reinforce_pp` there is no value function: step 5 takes another
estimator, and L has no L_V. With `kl.where: loss`, the penalty leaves step 4 and is added to L.

The run stops and resumes between iterations: the rollouts of the next one depend on nothing but
the weights, beta and the moments of the scores.

Source: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (KL-penalised rewards for language models);
Ahmadian et al. 2024 (RLOO), Shao et al. 2024 (GRPO), Hu et al. 2025 (REINFORCE++).

B rollouts of this process in an iteration, n of them in a minibatch, S tokens, T response tokens,
D width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_exp.algo.advantages import (
    RewardScaler,
    clip_scores,
    gae,
    group_relative,
    leave_one_out,
    rewards_to_go,
    shape_rewards,
    subtract_original_scores,
    whiten,
)
from rlhf_exp.algo.importance import (
    effective_share,
    importance_gap,
    sampler_kl,
    truncated_weights,
)
from rlhf_exp.algo.kl import KLController, k1, k3, kl_loss, sequence_kl
from rlhf_exp.algo.losses import (
    PolicyStats,
    ValueStats,
    entropy_bonus,
    policy_loss,
    value_loss,
)
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import FinishReason, Prompts, Rollouts, Samples, to_device
from rlhf_exp.config.training import (
    AdvantageEstimator,
    GroupScale,
    KlPlace,
    LossMean,
    PpoConfig,
)
from rlhf_exp.data.batching import (
    batch_index,
    epoch_permutation,
    length_sorted_shares,
    prompts_batch,
)
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.distributed.redistribute import (
    HostLengths,
    host_lengths,
    pad_to_common_widths,
    redistribute,
)
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy, ResponseOutputs
from rlhf_exp.models.reference import Reference, compare_with_reference
from rlhf_exp.rollout.ahead_engine import AheadEngine
from rlhf_exp.rollout.engine import RolloutEngine
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.rollout.trunk_pass import with_trunk_states
from rlhf_exp.training.memory import memory_phase
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.result import EvaluationResult
from rlhf_exp.training.reward_scorer import Scorer
from rlhf_exp.training.reward_terms import judge_samples, report_terms
from rlhf_exp.training.task import Update

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Evaluates the policy; what the first evaluation has found is kept, see `Validator`."""

    unit: float | None
    initial: list[float] | None

    def __call__(self) -> EvaluationResult:
        """Evaluate the policy as it is."""


class PpoTask:
    """PPO's training task.

    Args:
        policy: The policy, with its value head.
        engine: Samples, for the collector and the evaluator.
        collector: Makes each iteration's experience.
        evaluator: Answers validation prompts and scores the answers.
        section: Sizes and coefficients.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        collector: ExperienceCollector,
        evaluator: Evaluator,
        section: PpoConfig,
        world: World,
    ) -> None:
        self.module: nn.Module = policy
        self.engine, self._version = engine, 0
        self.collector, self.evaluator = collector, evaluator
        self.section, self.world = section, world
        self.meters = MetricAccumulator(world)
        self._forward: Callable[..., Any] = policy
        self._metrics: dict[str, float] = {}

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return self.section.updates

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper."""
        self._forward = wrapped

    def iterate(self, iteration: int, update: Update) -> None:
        """Run one iteration: collect experience, pass over it `epochs` times, set beta."""
        began = time.perf_counter()
        with self.world.gathered():  # sharded parameters are whole while responses are sampled
            self.engine.refresh(self._version)
            rollouts = self.collector.collect(iteration, self.meters, began)
            self.engine.release()
        rollouts = pad_to_common_widths(rollouts, self.world)
        lengths = host_lengths(rollouts, self.world)
        collected = time.perf_counter()
        for number, rows in enumerate(self.minibatches(iteration)):
            share = share_of_minibatch(rollouts, lengths, rows, self.world)
            by_token = self.section.loss_mean is LossMean.tokens
            total = int(lengths.responses[rows].sum()) if by_token else len(rows)
            update(self._losses(share, float(total), first=number == 0))
        self._version += 1
        ended = time.perf_counter()
        self.meters.add("time/update_s", ended - collected, 1.0)
        self._metrics = self._finish(ended - began)

    def minibatches(self, iteration: int) -> Iterator[np.ndarray]:
        """Yield the rows of each optimizer step among all processes' rollouts, epoch by epoch."""
        section = self.section
        for epoch in range(section.epochs):
            epochs_before = iteration * section.epochs + epoch
            order = epoch_permutation(section.rollouts, section.seed, epochs_before)
            for start in range(0, section.rollouts, section.batch):
                yield order[start : start + section.batch]

    def _losses(self, share: TrainingRows, total: float, first: bool) -> Iterator[Tensor]:
        """Yield each micro-batch's part (0-dim) of the loss of a minibatch.

        The loss is a mean over the response tokens of the whole minibatch, or over its responses,
        so that neither micro-batches nor processes change the gradient.

        Args:
            share: This process's rows, as many as the others'.
            total: What the mean is over: tokens or responses, of all processes.
            first: Whether the policy is still the one that sampled.
        """
        weight = torch.full((), total, device=self.world.device)
        for rows in self.world.micro_batches(share.split(self.section.micro_batch)):
            yield self._loss(rows, weight, first)

    def _loss(self, share: TrainingRows, total: Tensor, first: bool) -> Tensor:
        """Return the loss (0-dim) of a micro-batch, divided by the minibatch's `total` weight."""
        section, batch = self.section, share.rollouts
        lengths = share.lengths
        width, longest = int(lengths.responses.max()), int(lengths.whole.max())
        mask = batch.mask[:, :width]
        if section.loss_mean is LossMean.sequences:
            mask = mask / batch.response_lengths[:, None]
        states = None if batch.states is None else batch.states[:, :longest]
        with self.world.autocast():
            outputs: ResponseOutputs = self._forward(
                tokens=batch.tokens[:, :longest],
                prompt_lengths=lengths.prompts,
                response_lengths=lengths.responses,
                temperature=section.generation.temperature,
                states=None if states is None else states.to(self.world.device),
                with_entropy=section.entropy_coef > 0.0,
                width=width,
            )
        policy, policy_stats = policy_loss(
            outputs.logprobs,
            batch.logprobs[:, :width],
            batch.advantages[:, :width],
            mask,
            section.clip_range,
            total,
        )
        loss = policy
        report_policy_loss(policy, policy_stats, total, self.meters)
        if batch.values is not None:
            assert batch.returns is not None, "values without returns"
            value, value_stats = value_loss(
                outputs.values,
                batch.values[:, :width],
                batch.returns[:, :width],
                mask,
                section.clip_range_value,
                total,
            )
            loss = loss + section.vf_coef * value
            report_value_loss(value, value_stats, total, self.meters)
        if batch.ref_logprobs is not None:
            kl = kl_loss(
                outputs.logprobs,
                batch.logprobs[:, :width],
                batch.ref_logprobs[:, :width],
                mask,
                total,
                section.kl.estimator.value,
                section.kl.unbiased,
            )
            loss = loss + self.collector.controller.coef * kl
            self.meters.add("loss/kl", kl, policy_stats.count / total)
        if outputs.entropy is not None:
            loss = loss - section.entropy_coef * entropy_bonus(outputs.entropy, mask, total)
        self.meters.add("loss/total", loss, policy_stats.count / total)
        if first:
            # Away from 1 here, sampling and training would not see the same policy.
            self.meters.extreme("policy/ratio_first", policy_stats.ratio_max, largest=True)
        return loss

    def _finish(self, seconds: float) -> dict[str, float]:
        """Return the iteration's means, and let the KL controller react to them."""
        metrics, count = self.meters.means(), self.section.rollouts
        metrics["throughput/samples_per_s"] = count / seconds
        metrics["throughput/tokens_per_s"] = count * metrics["response/length_mean"] / seconds
        self.collector.controller.update(metrics["kl/sequence"], count)
        return metrics

    def metrics(self) -> dict[str, float]:
        """Return the iteration's means."""
        return self._metrics

    def distributions(self) -> dict[str, list[float]]:
        """Return the iteration's raw scores and its KL by response."""
        return self.meters.distributions()

    def evaluate(self) -> EvaluationResult:
        """Answer validation prompts and score the answers."""
        with self.world.gathered():
            self.engine.refresh(self._version)
            found = self.evaluator()
            self.engine.release()
        return found

    def state(self) -> dict[str, Any]:
        """Return the KL coefficient, the moments of the scores, and the first evaluation's."""
        return {
            "controller": self.collector.controller.state_dict(),
            "scaler": self.collector.scaler.state_dict(),
            "unit": self.evaluator.unit,
            "initial": self.evaluator.initial,
            **self.collector.ahead_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self._version += 1
        self.evaluator.unit, self.evaluator.initial = state["unit"], state["initial"]
        self.collector.controller.load_state_dict(state["controller"])
        self.collector.scaler.load_state_dict(state["scaler"])
        self.collector.load_ahead_state(state)

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""
        for name in ("loss/total", "kl/sequence", "reward/mean"):
            if not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        limit = self.section.kl.stop
        if limit is not None and metrics["kl/sequence"] > limit:
            return f"kl/sequence is {metrics['kl/sequence']:.3g}, above ppo.kl.stop={limit:g}"
        limit = self.section.reward.ensemble_stop
        if limit is not None and metrics["reward/ensemble_std"] > limit:
            return (
                f"reward/ensemble_std is {metrics['reward/ensemble_std']:.3g}, above "
                f"ppo.reward.ensemble_stop={limit:g}"
            )
        return None


@dataclass(frozen=True)
class TrainingRows:
    """Rows to train on, longest first.

    Attributes:
        rollouts: [n] rows.
        lengths: Of these.
    """

    rollouts: Rollouts
    lengths: HostLengths

    def split(self, size: int | None) -> list[TrainingRows]:
        """Return micro-batches of `size` rows; `None`: one of all rows.

        Rows of like length stay together, for a micro-batch costs as much as its longest row; and
        the longest come first, so that running out of memory happens at once.
        """
        count = len(self.rollouts)
        parts = [slice(start, start + (size or count)) for start in range(0, count, size or count)]
        return [TrainingRows(self.rollouts.select(part), self.lengths[part]) for part in parts]


def share_of_minibatch(
    rollouts: Rollouts, lengths: HostLengths, rows: np.ndarray, world: World
) -> TrainingRows:
    """Return this process's share of a minibatch; rows that only fill it up are masked out.

    Args:
        rollouts: This process's, as wide as all others'.
        lengths: Of all processes' rollouts.
        rows: [M] int64, the minibatch among all processes' rollouts.
        world: The processes.
    """
    shares, weights = length_sorted_shares(rows, lengths.whole, world.processes)
    share, own = redistribute(rollouts, shares, world), weights[world.rank]
    if not own.all():
        real = to_device(torch.from_numpy(own > 0), world.device)
        share = replace(share, mask=share.mask & real[:, None])
    return TrainingRows(share, lengths[shares[world.rank]])


@dataclass(frozen=True)
class PolicyOutputs:
    """Outputs of policy and reference for an iteration's responses.

    Attributes:
        logprobs: [B, T] float32 of the policy.
        values: [B, T] float32.
        entropy: [B, T] float32, nats.
        ref_logprobs: [B, T] float32 of the reference.
        states: [B, S, D] that enter the training blocks, or `None`.
    """

    logprobs: Tensor
    values: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    states: Tensor | None


class ExperienceCollector:
    """Makes each iteration's experience: sample, score, compare, estimate advantages.

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
        section: Sizes and coefficients.
        world: The processes.
        correction: Largest importance weight of a token, where the sampler's probabilities are not
            quite the policy's; `None`: all weights are 1.
        closing_token: What the scorer reads its score from, over the policy's trunk; `None`: it
            does not.
        ahead: Samples the next iteration while this one trains; `None`: each in its turn.
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
        section: PpoConfig,
        world: World,
        correction: float | None = None,
        closing_token: int | None = None,
        ahead: AheadEngine | None = None,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.sampler, self.scorer = sampler, scorer
        self.prompts, self.original_scores = prompts, original_scores
        self.scaler, self.controller = scaler, controller
        self._warned = False
        self.section, self.world = section, world
        self.correction, self.closing_token, self.ahead = correction, closing_token, ahead

    def collect(
        self, iteration: int, meters: MetricAccumulator, began: float | None = None
    ) -> Rollouts:
        """Return one iteration's rollouts, and report on them.

        Args:
            iteration: Its number.
            meters: For the metrics.
            began: When the iteration began: handing the engine its weights is part of sampling, and
                so is waiting for what is sampled ahead; `None`: now.
        """
        section, beta = self.section, self.controller.coef
        began = time.perf_counter() if began is None else began
        device = self.world.device
        with memory_phase("sampling", device):
            samples, weights = self._sample(iteration)
        sampled = time.perf_counter()
        with memory_phase("scoring", device):
            scores = self._score(samples, weights, meters)
        scored = time.perf_counter()
        with memory_phase("assessing", device):
            outputs = self._compare(samples)
        mask = response_mask(samples.response_lengths, outputs.logprobs.shape[1])
        mask = mask & (weights > 0)[:, None]
        in_loss = section.kl.where is KlPlace.loss
        rewards = shape_rewards(
            scores,
            outputs.logprobs,
            outputs.ref_logprobs,
            mask,
            0.0 if in_loss else beta,
            section.kl.estimator.value,
        )
        values, returns = outputs.values, None
        if section.uses_values:
            advantages, returns = gae(rewards, values, mask, section.gamma, section.lam)
            advantages = self._whiten(advantages, mask)
            report_values(values, returns, mask, meters, self.world)
        else:
            advantages = self._advantages_without_values(rewards, mask, weights, meters)
        report_kl(outputs.logprobs, outputs.ref_logprobs, outputs.entropy, mask, weights, meters)
        meters.add("kl/beta", beta, 1.0)
        report_sampler(outputs.logprobs, samples.logprobs, mask, meters, self.world)
        if self.correction is not None:
            gap = importance_gap(outputs.logprobs, samples.logprobs, mask)
            advantages = advantages * truncated_weights(gap, self.correction)
        rollouts = Rollouts(
            tokens=samples.tokens,
            prompt_lengths=samples.prompt_lengths,
            response_lengths=samples.response_lengths,
            mask=mask,
            logprobs=outputs.logprobs,
            values=values if section.uses_values else None,
            advantages=advantages,
            returns=returns,
            ref_logprobs=outputs.ref_logprobs if in_loss else None,
            weights=weights,
            states=outputs.states,
        )
        report_responses(samples, weights, meters)
        meters.add("time/rollout_s", sampled - began, 1.0)
        meters.add("time/score_s", scored - sampled, 1.0)
        meters.add("time/assess_s", time.perf_counter() - scored, 1.0)
        return rollouts

    def _sample(self, iteration: int) -> tuple[Samples, Tensor]:
        """Answer the iteration's prompts; return this process's responses and weights [B].

        A row of weight 0 only fills this process's share up.
        """
        section, device = self.section, self.world.device
        samples = None if self.ahead is None else self.ahead.take(iteration)
        if samples is None:
            samples = self.sampler(self._prompts(iteration))
        if self.ahead is not None and iteration + 1 < section.iterations:
            self.ahead.begin(iteration + 1, self._prompts(iteration + 1))
        samples = samples.to(device)
        if self.closing_token is not None and samples.closing is None:
            with self.world.autocast():
                samples = with_trunk_states(
                    samples, self.policy.trunk, section.generation.batch, self.closing_token
                )
        return samples, torch.from_numpy(self.world.share(section.rollouts).weights).to(device)

    def _prompts(self, iteration: int) -> Prompts:
        """Return this process's share of an iteration's prompts.

        The noise is a function of the rollout's number in the whole run.
        """
        section, count = self.section, self.section.rollouts
        chosen = batch_index(len(self.prompts), section.prompts, section.seed, iteration)
        chosen = np.repeat(chosen, section.samples_per_prompt)
        share = self.world.share(count)
        numbers = np.arange(iteration * count, (iteration + 1) * count)
        batch = prompts_batch(self.prompts, chosen[share.rows], numbers[share.rows])
        return batch.to(self.world.device)

    def ahead_state(self) -> dict[str, Any]:
        """Return the responses of the next iteration that are sampled already, of all processes."""
        own = None if self.ahead is None else self.ahead.state()
        if own is None:
            return {}
        shares = self.world.all_gather_object(own["rows"])
        rows = [row for share in shares for row in share][: self.section.rollouts]
        return {"ahead": own | {"rows": rows}}

    def load_ahead_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `ahead_state` returned, by perhaps another number of processes."""
        if self.ahead is not None and "ahead" in state:
            found = state["ahead"]
            own = self.world.share(self.section.rollouts).rows
            self.ahead.load_state(found["iteration"], [found["rows"][row] for row in own])

    def _score(self, samples: Samples, weights: Tensor, meters: MetricAccumulator) -> Tensor:
        """Return what goes into the reward: [B] float32, penalised, compared, clipped, scaled."""
        reward, device = self.section.reward, self.world.device
        found = judge_samples(self.scorer, samples)
        raw = found.total.to(device)
        report_scores(raw, weights, meters)
        report_terms(found, weights, meters)
        scores = raw - reward.missing_eos_penalty * (samples.finish == FinishReason.LENGTH)
        sizes = raw.abs()
        if self.original_scores is not None:
            originals = self.original_scores[samples.index.cpu()].to(device)
            scores = subtract_original_scores(scores, originals)
            sizes = torch.maximum(sizes, originals.abs())
            meters.add("reward/delta_mean", (scores * weights).sum(), weights.sum())
        if reward.clip is not None:
            scores = clip_scores(scores, reward.clip)
        everyone = self.world.gather(torch.stack([scores, sizes], dim=1)[weights > 0])
        scaled = self.scaler.scale(scores, everyone[:, 0], everyone[:, 1].max().item())
        meters.add("reward/scale", self.scaler.divisor, 1.0)
        self._warn_of_equal_scores()
        return scaled

    def _warn_of_equal_scores(self) -> None:
        if self.scaler.all_equal and not self._warned and self.world.is_main:
            self._warned = True
            log.warning(
                "ppo.reward.scale=%s: the %d scores so far are equal but for rounding (about %.6g, "
                "standard deviation %.2g), so they are not divided by it; while no answer is "
                "better than another, nothing but the KL penalty is learned",
                *(self.scaler.mode, self.scaler.moments.count),
                *(self.scaler.moments.mean, self.scaler.moments.spread),
            )

    def _advantages_without_values(
        self, rewards: Tensor, mask: Tensor, weights: Tensor, meters: MetricAccumulator
    ) -> Tensor:
        """Return the advantages [B, T] by RLOO, GRPO or REINFORCE++, and report on the groups.

        A group may lie in several processes: each looks at the rewards of all.

        Args:
            rewards: [B, T] per token.
            mask: [B, T] bool.
            weights: [B], 0 for a row that fills up.
            meters: For the metrics.
        """
        section = self.section
        if section.advantage is AdvantageEstimator.reinforce_pp:
            return self._whiten(rewards_to_go(rewards, mask, section.gamma), mask)
        size = section.samples_per_prompt
        everyone = self.world.gather(rewards.sum(1)[weights > 0])
        if section.advantage is AdvantageEstimator.rloo:
            advantages = leave_one_out(everyone, size)
        else:
            divide = section.grpo_scale is GroupScale.std
            advantages = group_relative(everyone, size, divide)
        spread = everyone.view(-1, size).std(1)
        meters.add("reward/group_std", spread.mean(), 1.0)
        meters.add("reward/group_equal_fraction", (spread == 0).float().mean(), 1.0)
        own = torch.from_numpy(self.world.share(section.rollouts).rows).to(advantages.device)
        return advantages[own, None].expand(mask.shape).masked_fill(~mask, 0.0)

    def _whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        return whiten(advantages, mask, *moments(advantages, mask, self.world))

    def _compare(self, samples: Samples) -> PolicyOutputs:
        """Run policy and reference over all responses, with the states that training will use."""
        rows, width = len(samples), int(samples.response_lengths.max())
        results = [torch.zeros(rows, width, device=self.world.device) for _ in range(4)]
        states = known = samples.states
        for part in compare_with_reference(
            self.policy,
            self.reference,
            samples,
            self.section.generation.temperature,
            self.section.generation.batch,
            self.world.autocast,
            states=known,
            with_entropy=True,
            width=width,
        ):
            if known is None and part.states is not None:
                if states is None:
                    shape = (rows, samples.tokens.shape[1], part.states.shape[2])
                    states = part.states.new_zeros(shape)
                states[part.rows, : part.states.shape[1]] = part.states
            assert part.policy.entropy is not None
            found = (part.policy.logprobs, part.policy.values, part.policy.entropy)
            for result, value in zip(results, (*found, part.ref_logprobs), strict=True):
                result[part.rows] = value.float()
        logprobs, values, entropy, ref_logprobs = results
        return PolicyOutputs(logprobs, values, entropy, ref_logprobs, states)


def report_policy_loss(
    loss: Tensor, stats: PolicyStats, total: Tensor, meters: MetricAccumulator
) -> None:
    """Report a micro-batch's policy loss (0-dim), divided by the minibatch's `total` weight."""
    meters.add("loss/policy", loss, stats.count / total)
    meters.add("policy/clip_fraction", stats.clipped, stats.count)
    meters.add("policy/approx_kl", stats.approx_kl, stats.count)
    meters.extreme("policy/ratio_max", stats.ratio_max, largest=True)


def report_value_loss(
    loss: Tensor, stats: ValueStats, total: Tensor, meters: MetricAccumulator
) -> None:
    """Report a micro-batch's value loss (0-dim), divided by the minibatch's `total` weight."""
    meters.add("loss/value", loss, stats.count / total)
    meters.add("value/clip_fraction", stats.clipped, stats.count)


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


def report_sampler(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    meters: MetricAccumulator,
    world: World,
) -> None:
    """Report how far the sampler's log-probabilities [B, T] are from the policy's."""
    gap, tokens = importance_gap(logprobs, sampler_logprobs, mask), mask.sum()
    meters.add("rollout/logprob_gap_mean", gap.abs().sum(), tokens)
    meters.extreme("rollout/logprob_gap_max", gap.abs().max(), largest=True)
    meters.add("rollout/kl", sampler_kl(logprobs, sampler_logprobs, mask).sum(), tokens)
    weights = gap.double().exp() * mask
    meters.extreme("rollout/weight_max", weights.max(), largest=True)
    sums = world.sum(torch.stack([weights.sum(), weights.square().sum(), tokens.double()]))
    meters.add("rollout/ess", effective_share(*sums), 1.0)


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
    meters.add("prompt/length_mean", (samples.prompt_lengths * weights).sum(), count)
    lengths = (samples.response_lengths * weights).sum()
    meters.add("response/length_mean", lengths, count)
    for name, reason in (("eos", FinishReason.EOS), ("stop", FinishReason.STOP)):
        ended = ((samples.finish == reason) * weights).sum()
        meters.add(f"response/{name}_fraction", ended, count)


def moments(values: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of masked values over all processes."""
    count = world.sum(mask.sum().double())
    mean = world.sum((values.double() * mask).sum()) / count
    variance = world.sum(((values.double() - mean).square() * mask).sum()) / count
    return mean.float(), variance.sqrt().float()
