"""What a study's votes say so far: preference, agreement, sides, progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from rlhf_exp.evaluation.agreement import (
    PairAgreement,
    SideBias,
    krippendorff_alpha,
    majority,
    mean_agreement,
    mean_value,
    pairwise_agreement,
    side_bias,
)
from rlhf_exp.evaluation.preference import Preference, preference
from rlhf_exp.human.items import Item
from rlhf_exp.human.study import Study
from rlhf_exp.human.votes import Choice, Vote, ratings


@dataclass(frozen=True)
class Progress:
    """How far one annotator is.

    Attributes:
        annotator: the name.
        answered: items with an answer to every question.
        median_s: median seconds from page to answer; NaN where none is known.
    """

    annotator: str
    answered: int
    median_s: float


@dataclass(frozen=True)
class CriterionResult:
    """The votes on one question.

    Attributes:
        criterion: the question.
        votes: number of votes.
        judged: prompts with at least one vote.
        identical: prompts with identical answers, counted as ties in `preference`.
        preference: over prompts, each by the majority of its votes.
        names: the annotators who voted; columns of `agreement`.
        agreement: of every two of them.
        alpha: Krippendorff's, nominal: every difference counts the same.
        alpha_ordinal: the same, with a against b counting for more than either against a tie.
        sides: whether the answer shown first is chosen more often.
    """

    criterion: str
    votes: int
    judged: int
    identical: int
    preference: Preference
    names: tuple[str, ...]
    agreement: tuple[PairAgreement, ...]
    alpha: float
    alpha_ordinal: float
    sides: SideBias

    @property
    def mean_agreement(self) -> float:
        """Share of equal votes over all pairs of annotators; NaN without any."""
        return mean_agreement(list(self.agreement))


@dataclass(frozen=True)
class Results:
    """A study's votes so far."""

    items: int
    progress: tuple[Progress, ...]
    criteria: tuple[CriterionResult, ...]


def results(study: Study) -> Results:
    """Summarise the votes that are stored now."""
    votes, about = study.votes(), study.about
    names = [annotator.name for annotator in study.annotators()]
    return Results(
        len(study.items),
        tuple(_progress(name, votes, len(about.criteria)) for name in names),
        tuple(
            criterion_result(
                criterion,
                [vote for vote in votes if vote.criterion == criterion],
                study.items,
                about.identical,
                about.seed,
            )
            for criterion in about.criteria
        ),
    )


def criterion_result(
    criterion: str, votes: Sequence[Vote], items: Sequence[Item], identical: int, seed: int
) -> CriterionResult:
    """Summarise the votes on one question."""
    names = tuple(sorted({vote.annotator for vote in votes}))
    table = ratings(votes, items, names)
    table = table[(~np.isnan(table)).any(axis=1)]
    # Ties only count once people have begun: without votes there is no result.
    ties = identical if len(table) else 0
    signs = np.concatenate([majority(table), np.zeros(ties, dtype=np.int64)])
    values = np.concatenate([mean_value(table), np.full(ties, 0.5)])
    first = sum(vote.choice is Choice.A for vote in votes)
    second = sum(vote.choice is Choice.B for vote in votes)
    return CriterionResult(
        criterion=criterion,
        votes=len(votes),
        judged=len(table),
        identical=ties,
        preference=preference(signs, values, seed),
        names=names,
        agreement=tuple(pairwise_agreement(table)),
        alpha=krippendorff_alpha(table),
        alpha_ordinal=krippendorff_alpha(table, "ordinal"),
        sides=side_bias(first, second),
    )


def _progress(name: str, votes: Sequence[Vote], criteria: int) -> Progress:
    own = [vote for vote in votes if vote.annotator == name]
    answers: dict[str, int] = {}
    for vote in own:
        answers[vote.item] = answers.get(vote.item, 0) + 1
    times = [vote.seconds for vote in own if vote.seconds is not None]
    whole = sum(count == criteria for count in answers.values())
    return Progress(name, whole, median(times) if times else math.nan)
