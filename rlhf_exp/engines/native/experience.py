"""One iteration's experience: sample, score, assess, shape, estimate advantages.

B rollouts of this process, S tokens, T response tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.gae import gae, whiten
from rlhf_exp.algo.kl import KLController
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.algo.rewards import RewardScaler, clip, delta, shape_rewards
from rlhf_exp.batch import Finish, Prompts, Rollouts, Samples
from rlhf_exp.data.collate import prompts_batch
from rlhf_exp.data.order import batch_index
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.meters import Meters
from rlhf_exp.engines.native.reporting import (
    moments,
    report_kl,
    report_responses,
    report_scores,
    report_values,
)
from rlhf_exp.engines.native.sample_scores import score_samples
from rlhf_exp.engines.native.scoring import Scorer
from rlhf_exp.engines.native.split import by_length
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference

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
class Assessed:
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


class Collector:
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

    def collect(self, iteration: int, meters: Meters) -> Rollouts:
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

    def _score(self, samples: Samples, weights: Tensor, meters: Meters) -> Tensor:
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
    def _assess(self, samples: Samples) -> Assessed:
        """Run policy and reference over all responses, with the states that training will use."""
        rows, width = len(samples), int(samples.response_lengths.max())
        results = [torch.zeros(rows, width, device=self.world.device) for _ in range(4)]
        states = self._given_states(samples)
        keep = states
        lengths = (samples.prompt_lengths + samples.response_lengths).cpu()
        for part in by_length(lengths, self.settings.batch):
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
        return Assessed(logprobs, values, entropy, ref_logprobs, keep)

    def _given_states(self, samples: Samples) -> Tensor | None:
        usable = self.settings.reuse_states and self.policy.cut is not None
        return samples.states if usable else None

    def _estimate(
        self, samples: Samples, weights: Tensor, scores: Tensor, found: Assessed, meters: Meters
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
