"""Several rewards added up, ensembles of reward models, and what each of them says.

A response's score is the sum of its terms' scores, each times its weight. What follows then
(penalty, delta, clip, scale: see `training/ppo.py`) sees the sum alone.

B rows of this process, M models of an ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_exp.batch import Samples
from rlhf_exp.config.training import Combine
from rlhf_exp.training.reward_scorer import ModelScorer, PromptRows, Scorer, score_samples
from rlhf_exp.training.scorers import reads_rows, set_rows

if TYPE_CHECKING:
    # An evaluation scores by terms, too, and reports in its own way.
    from rlhf_exp.training.metrics import MetricAccumulator


class LengthScorer:
    """Scores by length: 0 at the target, -1 at no token and at twice the target.

    Args:
        target: Length in tokens of a response's content.
    """

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`."""
        return -(content_lengths.cpu().float() - self.target).abs() / self.target


def combine_scores(scores: Tensor, combine: Combine, coef: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what an ensemble says of each response [B], and how far its models disagree [B].

    Coste et al. 2023 (https://arxiv.org/abs/2310.02743), section 3.2: the mean, the worst case, and
    the mean less a penalty for disagreement. Theirs is a multiple of the variance; here it is of
    the standard deviation, which has the scores' own unit.

    Args:
        scores: [M, B] of its models.
        combine: Which of the three.
        coef: Standard deviations that `uncertainty` subtracts.
    """
    spread = scores.std(0, correction=0)
    if combine is Combine.min:
        return scores.amin(0), spread
    mean = scores.mean(0)
    return (mean - coef * spread if combine is Combine.uncertainty else mean), spread


class EnsembleScorer:
    """Scores by several reward models.

    Args:
        scorers: Of its models.
        combine: What they say together.
        coef: See `combine_scores`.
    """

    def __init__(self, scorers: Sequence[ModelScorer], combine: Combine, coef: float) -> None:
        self.scorers, self.combine, self.coef = list(scorers), combine, coef

    def judge(
        self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return scores and standard deviations, [B] each; see `Scorer` for the arguments."""
        found = [scorer(tokens, prompt_lengths, content_lengths) for scorer in self.scorers]
        return combine_scores(torch.stack(found), self.combine, self.coef)

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`."""
        return self.judge(tokens, prompt_lengths, content_lengths)[0]


@dataclass(frozen=True)
class Scores:
    """Scores of responses, and what they are made of.

    Attributes:
        total: [B] float32.
        terms: [B] float32 of each term, by its name, before weights; empty for a single reward.
        spread: [B] float32, the standard deviation of an ensemble's models, of several ensembles
            the largest; `None` without one.
    """

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    spread: Tensor | None = None


class MixedScorer:
    """Scores by several terms.

    Args:
        terms: Weight and scorer of each, by its name.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Scorer]]) -> None:
        self.terms = dict(terms)

    def judge(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Scores:
        """Return the sum and its parts; see `Scorer` for the arguments."""
        total = torch.zeros(len(tokens))
        found: dict[str, Tensor] = {}
        spreads: list[Tensor] = []
        for name, (weight, scorer) in self.terms.items():
            if isinstance(scorer, EnsembleScorer):
                scores, spread = scorer.judge(tokens, prompt_lengths, content_lengths)
                spreads.append(spread)
            else:
                scores = scorer(tokens, prompt_lengths, content_lengths)
            found[name] = scores
            total = total + weight * scores
        return Scores(total, found, torch.stack(spreads).amax(0) if spreads else None)

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`."""
        return self.judge(tokens, prompt_lengths, content_lengths).total


def scorers_within(scorer: Scorer) -> list[Scorer]:
    """Return the scorers that a scorer is made of, itself if it is a single one."""
    if isinstance(scorer, MixedScorer):
        return [part for _, term in scorer.terms.values() for part in scorers_within(term)]
    return list(scorer.scorers) if isinstance(scorer, EnsembleScorer) else [scorer]


def set_all_rows(scorer: Scorer, rows: PromptRows) -> None:
    """Give a scorer, and all within it, the rows of the prompts that it will be handed."""
    for part in scorers_within(scorer):
        set_rows(part, rows)


def any_reads_rows(scorer: Scorer) -> bool:
    """Return whether a scorer, or one within it, depends on other fields of the rows."""
    return any(map(reads_rows, scorers_within(scorer)))


def judge_samples(scorer: Scorer, samples: Samples) -> Scores:
    """Return the scores of sampled responses, and what they are made of."""
    if not isinstance(scorer, MixedScorer):
        return Scores(score_samples(scorer, samples))
    lengths = samples.prompt_lengths.cpu(), samples.content_lengths.cpu()
    return scorer.judge(samples.tokens.cpu(), *lengths)


def report_terms(
    scores: Scores, weights: Tensor, meters: MetricAccumulator, prefix: str = ""
) -> None:
    """Report mean and standard deviation of each term, and an ensemble's disagreement.

    Args:
        scores: Of B responses.
        weights: [B], 0 for a row that fills up.
        meters: For the metrics.
        prefix: Before the metrics' names.
    """
    for name, values in scores.terms.items():
        own = values.to(weights.device)
        meters.add(f"{prefix}reward/term/{name}/mean", (own * weights).sum(), weights.sum())
        meters.spread(f"{prefix}reward/term/{name}/std", own, weights)
    if scores.spread is not None:
        spread = scores.spread.to(weights.device)
        meters.add(f"{prefix}reward/ensemble_std", (spread * weights).sum(), weights.sum())
