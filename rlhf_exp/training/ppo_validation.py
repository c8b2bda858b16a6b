"""PPO's evaluation during training: answers to the same validation prompts, scored.

The noise of sampling is the same at each evaluation, so that two of them differ by the policy
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.kl import sequence_kl
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.algo.preference import wins
from rlhf_exp.batch import Finish, Samples
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.optim import length_sorted_micro_batches
from rlhf_exp.training.ppo import Sampler
from rlhf_exp.training.reward_scorer import Scorer, texts_of
from rlhf_exp.training.scorers import score_samples
from rlhf_exp.training.task import Evaluation, SampleTable

SHOWN = 20
"""Of so many answers, the first, a table is made."""


@dataclass(frozen=True)
class ValidationSettings:
    """How validation prompts are answered.

    Attributes:
        prompts: How many, from the first on.
        temperature: Of the log-probabilities.
        batch: Rows of a forward pass.
        kl_coef: Weight of the KL divergence in the objective.
        scaled: Whether PPO scales its scores, and the objective likewise.
        kl_budget: Where set, the objective is the score alone, up to this sequence KL in nats.
        by_wins: Whether the objective is the win rate instead, up to `kl_budget` if there is one.
    """

    prompts: int
    temperature: float
    batch: int
    kl_coef: float
    scaled: bool
    kl_budget: float | None = None
    by_wins: bool = False

    def unit(self, first: Mapping[str, float]) -> float:
        """Return what scores are divided by in the objective, from the first evaluation."""
        return (first["eval/reward_std"] or 1.0) if self.scaled else 1.0

    def objective(self, found: Mapping[str, float], unit: float) -> float:
        """Return the objective of an evaluation."""
        return found["eval/reward_mean"] / unit - self.kl_coef * found["eval/kl_sequence"]

    def judged(self, found: Mapping[str, float], unit: float) -> float:
        """Return what the best weights are selected by."""
        if self.kl_budget is None and not self.by_wins:
            return self.objective(found, unit)
        if self.kl_budget is not None and found["eval/kl_sequence"] > self.kl_budget:
            return -math.inf
        return found["eval/win_rate"] if self.by_wins else found["eval/reward_mean"] / unit


class Validator:
    """Evaluates a policy on validation prompts.

    The objective is PPO's own: the mean score, in standard deviations of the initial policy's
    scores where PPO scales them, minus `kl_coef` times the mean sequence KL; with a budget of KL,
    the mean score of what keeps to it. Reward alone would select the most over-optimised policy.

    Attributes:
        unit: What scores are divided by in the objective; known from the first evaluation on.
        initial: Scores of the first evaluation, the initial policy's, by prompt: what wins are
            counted against.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        sampler: Sampler,
        scorer: Scorer,
        prompts: TokenizedPrompts,
        codec: Codec,
        settings: ValidationSettings,
        world: World,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.sampler, self.scorer = sampler, scorer
        self.prompts, self.codec = prompts, codec
        self.settings, self.world = settings, world
        self.unit: float | None = None
        self.initial: list[float] | None = None

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Sample, score and compare with the reference."""
        meters = MetricAccumulator(self.world)
        count = min(self.settings.prompts, len(self.prompts))
        share = self.world.share(count)
        batch = prompts_batch(self.prompts, share.rows, np.asarray(share.rows))
        samples = self.sampler(batch.to(self.world.device))
        weights = torch.from_numpy(share.weights).to(self.world.device)
        scores = score_samples(self.scorer, samples).to(self.world.device)
        if self.initial is None:
            self.initial = self.world.gather(scores)[:count].tolist()
        before = torch.tensor(self.initial)[share.rows].to(self.world.device)
        kl = self.sequence_kl(samples)
        total = weights.sum()
        meters.add("eval/reward_mean", (scores * weights).sum(), total)
        meters.spread("eval/reward_std", scores, weights)
        meters.add("eval/win_rate", (wins(scores, before) * weights).sum(), total)
        meters.add("eval/kl_sequence", (kl * weights).sum(), total)
        meters.add("eval/length_mean", (samples.response_lengths * weights).sum(), total)
        ended = (samples.finish != Finish.LENGTH) * weights
        meters.add("eval/ended_fraction", ended.sum(), total)
        found = meters.means()
        if self.unit is None:
            self.unit = self.settings.unit(found)
        found["eval/objective"] = self.settings.objective(found, self.unit)
        judged = self.settings.judged(found, self.unit)
        return Evaluation(found, judged, self._table(samples, scores, kl))

    def sequence_kl(self, samples: Samples) -> Tensor:
        """Return the sum of k1 over each response [B], in nats."""
        kl = torch.zeros(len(samples), device=self.world.device)
        for part in length_sorted_micro_batches(
            (samples.prompt_lengths + samples.response_lengths).cpu(), self.settings.batch
        ):
            rows = samples.select(part)
            longest = int((rows.prompt_lengths + rows.response_lengths).max())
            arguments = (
                rows.tokens[:, :longest],
                rows.prompt_lengths,
                rows.response_lengths,
                self.settings.temperature,
            )
            with self.world.autocast():
                states = None
                if self.policy.cut is not None:
                    states = self.policy.trunk_states(arguments[0])
                outputs = self.policy.response_outputs(*arguments, states=states)
                expected = self.reference.logprobs(*arguments, states=states)
            mask = response_mask(rows.response_lengths, expected.shape[1])
            kl[part] = sequence_kl(outputs.logprobs, expected, mask)
        return kl

    def _table(self, samples: Samples, scores: Tensor, kl: Tensor) -> SampleTable:
        shown = samples.select(slice(0, SHOWN))
        prompts, responses = texts_of(
            shown.tokens, shown.prompt_lengths, shown.content_lengths, self.codec
        )
        rows = zip(prompts, responses, scores[:SHOWN].tolist(), kl[:SHOWN].tolist(), strict=True)
        return SampleTable(["prompt", "response", "score", "kl"], [list(row) for row in rows])
