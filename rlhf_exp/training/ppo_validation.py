"""PPO's evaluation during training, and the objective by which the best weights are selected.

The same validation prompts are answered with the same noise each time, so that two evaluations
differ by the policy alone. The objective is PPO's own: the mean score, in standard deviations of
the initial policy's scores where PPO scales them, minus `kl.coef` times the mean sequence KL; with
a budget of KL, the mean score of weights that keep to it. Reward alone would select the most
over-optimised policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.algo.preference import wins
from rlhf_exp.batch import Samples
from rlhf_exp.config.training import PpoConfig
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.ppo_objective import SHOWN, objective, score_unit, selection_score
from rlhf_exp.training.result import EvaluationResult, SampleTable
from rlhf_exp.training.reward_scorer import Scorer, texts_of
from rlhf_exp.training.reward_terms import Scores, judge_samples, report_terms
from rlhf_exp.training.validation_answers import sample_answers


class Validator:
    """Evaluates a policy on validation prompts.

    Attributes:
        unit: Divisor of scores in the objective; known from the first evaluation on.
        initial: Scores of the first evaluation, the initial policy's, by prompt; wins are counted
            against them.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        sampler: Sampler,
        scorer: Scorer,
        prompts: TokenizedPrompts,
        codec: Codec,
        section: PpoConfig,
        world: World,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.sampler, self.scorer = sampler, scorer
        self.prompts, self.codec = prompts, codec
        self.section, self.world = section, world
        self.unit: float | None = None
        self.initial: list[float] | None = None

    @torch.no_grad()
    def __call__(self) -> EvaluationResult:
        """Sample, score and compare with the reference."""
        meters = MetricAccumulator(self.world)
        count = min(self.section.eval_prompts, len(self.prompts))
        samples, rows, weights, kl = sample_answers(
            self.policy,
            self.reference,
            self.sampler,
            self.prompts,
            count,
            self.section.generation,
            self.world,
            meters,
        )
        found = judge_samples(self.scorer, samples)
        scores = found.total.to(self.world.device)
        if self.initial is None:
            self.initial = self.world.gather(scores)[:count].tolist()
        before = torch.tensor(self.initial)[rows].to(self.world.device)
        total = weights.sum()
        meters.add("eval/reward_mean", (scores * weights).sum(), total)
        meters.spread("eval/reward_std", scores, weights)
        report_terms(found, weights, meters, "eval/")
        meters.add("eval/win_rate", (wins(scores, before) * weights).sum(), total)
        metrics = meters.means()
        if self.unit is None:
            self.unit = score_unit(self.section, metrics)
        metrics["eval/objective"] = objective(self.section, metrics, self.unit)
        selected_by = selection_score(self.section, metrics, self.unit)
        return EvaluationResult(metrics, selected_by, self._table(samples, found, kl))

    def _table(self, samples: Samples, scores: Scores, kl: Tensor) -> SampleTable:
        shown = samples.select(slice(0, SHOWN))
        prompts, responses = texts_of(
            shown.tokens, shown.prompt_lengths, shown.content_lengths, self.codec
        )
        numbers = {"score": scores.total, **scores.terms, "kl": kl}
        columns = [values[:SHOWN].tolist() for values in numbers.values()]
        rows = zip(prompts, responses, *columns, strict=True)
        return SampleTable(["prompt", "response", *numbers], [list(row) for row in rows])
