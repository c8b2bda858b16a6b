"""The results of a campaign so far: preference, agreement, sides, progress.

They come as lines of text, the same for the terminal and the owner's page, and as plain values for
the report of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rlhf_exp.annotation.campaign import (
    Campaign,
    CampaignInfo,
    Choice,
    Item,
    Vote,
    question,
    ratings,
)
from rlhf_exp.errors import UserError
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
from rlhf_exp.evaluation.preference import POWER, PreferenceResult, summarise_preference
from rlhf_exp.evaluation.statistics import Interval

Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class Results:
    """A campaign's votes so far."""

    items: int
    progress: tuple[AnnotatorProgress, ...]
    criteria: tuple[CriterionResult, ...]


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
        agreement: agreement of every two of them.
        alpha: Krippendorff's, nominal: every difference counts the same.
        alpha_ordinal: the same, with a against b counting for more than either against a tie.
        sides: whether the answer shown first is chosen more often.
    """

    criterion: str
    votes: int
    judged: int
    identical: int
    preference: PreferenceResult
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
class AnnotatorProgress:
    """The progress of one annotator.

    Attributes:
        name: the annotator's name.
        answered: items with an answer to every question.
        median_s: median seconds from page to answer; NaN if unknown.
    """

    name: str
    answered: int
    median_s: float


def results(campaign: Campaign) -> Results:
    """Summarise the votes that are stored now."""
    votes, info = campaign.votes(), campaign.info
    names = [annotator.name for annotator in campaign.annotators()]
    return Results(
        len(campaign.items),
        tuple(_annotator_progress(name, votes, len(info.criteria)) for name in names),
        tuple(
            criterion_result(
                criterion,
                [vote for vote in votes if vote.criterion == criterion],
                campaign.items,
                info.identical,
                info.seed,
            )
            for criterion in info.criteria
        ),
    )


def criterion_result(
    criterion: str, votes: Sequence[Vote], items: Sequence[Item], identical: int, seed: int
) -> CriterionResult:
    """Summarise the votes on one question."""
    names = tuple(sorted({vote.annotator for vote in votes}))
    table = ratings(votes, items, names)
    table = table[(~np.isnan(table)).any(axis=1)]
    # Identical answers only count once people have begun: without votes there is no result.
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
        preference=summarise_preference(signs, values, seed),
        names=names,
        agreement=tuple(pairwise_agreement(table)),
        alpha=krippendorff_alpha(table),
        alpha_ordinal=krippendorff_alpha(table, "ordinal"),
        sides=side_bias(first, second),
    )


def _annotator_progress(name: str, votes: Sequence[Vote], criteria: int) -> AnnotatorProgress:
    votes_of_annotator = [vote for vote in votes if vote.annotator == name]
    answers: dict[str, int] = {}
    for vote in votes_of_annotator:
        answers[vote.item] = answers.get(vote.item, 0) + 1
    times = [vote.seconds for vote in votes_of_annotator if vote.seconds is not None]
    complete = sum(count == criteria for count in answers.values())
    return AnnotatorProgress(name, complete, median(times) if times else math.nan)


def preference_lines(result: CriterionResult, info: CampaignInfo) -> Lines:
    """Return (name, value) of one question's result on the models."""
    preference = result.preference
    outcome, ties_as_half = preference.outcome, preference.ties_as_half
    if outcome.total == 0 or ties_as_half is None:
        return [("Prompts", "none judged yet")]
    by = f"{result.judged} by people"
    if result.identical:
        by += f", {result.identical} with identical answers, counted as ties"
    at_least = outcome.wins + outcome.ties
    net = 100 * (outcome.wins - outcome.losses) / outcome.total
    lines = [
        ("Prompts", f"{outcome.total} ({by})"),
        (f"{info.name_b} better", _share(outcome.wins, outcome.total)),
        ("Tie", _share(outcome.ties, outcome.total)),
        (f"{info.name_a} better", _share(outcome.losses, outcome.total)),
        (f"{info.name_b} at least as good", _share(at_least, outcome.total)),
        ("Net", f"{net:+.1f} points"),
        ("Exact sign test", f"p = {preference.p_value:.3g}, ties left out"),
        (
            "Win rate among decided",
            _value_with_interval(outcome.win_rate, preference.win_rate, "Clopper-Pearson"),
        ),
        (
            "Ties as half",
            _value_with_interval(
                ties_as_half.mean,
                Interval(ties_as_half.low, ties_as_half.high),
                "bootstrap over prompts",
            ),
        ),
    ]
    if preference.needed is not None:
        lines.append(
            (
                f"Needed for {100 * POWER:.0f} % power",
                f"{preference.needed} decided prompts, about {preference.needed_prompts} in all, "
                "if the effect is the one found",
            )
        )
    return lines


def quality_lines(result: CriterionResult) -> Lines:
    """Return (name, value) of the quality of the voting on one question."""
    sides = result.sides
    lines = [("Votes", str(result.votes))]
    if len(result.names) > 1:
        lines.append(("Agreement of two annotators", _percent(result.mean_agreement)))
        for pair in result.agreement:
            who = f"{result.names[pair.first]} and {result.names[pair.second]}"
            lines.append((who, f"{_percent(pair.share)} of {pair.both} prompts"))
        lines.append(("Krippendorff's alpha, nominal", _number(result.alpha)))
        lines.append(("Krippendorff's alpha, ordinal", _number(result.alpha_ordinal)))
    if sides.first + sides.second:
        share = _value_with_interval(sides.share, sides.interval, "Clopper-Pearson")
        lines.append(("Answer A chosen", f"{share}; p = {sides.p_value:.3g} for no side bias"))
    return lines


def _value_with_interval(value: float, interval: Interval, kind: str) -> str:
    if not math.isfinite(value):
        return "unknown"
    if not math.isfinite(interval.low):
        return f"{value:.3f}"
    return f"{value:.3f} (95 % {interval.low:.3f} to {interval.high:.3f}, {kind})"


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "unknown"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "unknown"


def campaign_summaries(folder: Path, source: str) -> list[dict[str, Any]]:
    """Return the results on one evaluation, campaign by campaign, as JSON values.

    Annotators are numbered, because a report has more readers than the campaign's own page.

    Args:
        folder: The folder of campaigns.
        source: Origin of their answers, such as `eval/KEY`.
    """
    summaries = []
    for path in sorted(folder.glob("*.sqlite")):
        try:
            campaign = Campaign(path)
        except UserError:
            continue  # unreadable: `rlhf-exp annotate` says why
        if campaign.info.source == source and not campaign.info.collect:
            summaries.append(_summary(campaign))
    return summaries


def _summary(campaign: Campaign) -> dict[str, Any]:
    info = campaign.info
    criteria = results(campaign).criteria
    return {
        "study": campaign.path.stem,
        "names": [info.name_a, info.name_b],
        "prompts": len(campaign.items) + info.identical,
        "criteria": [_criterion_to_json(result, campaign) for result in criteria],
    }


def _criterion_to_json(result: CriterionResult, campaign: Campaign) -> dict[str, Any]:
    names = tuple(f"annotator {number}" for number in range(1, len(result.names) + 1))
    outcome = result.preference.outcome
    return {
        "criterion": result.criterion,
        "question": question(result.criterion),
        "voters": len(result.names),
        "p_value": result.preference.p_value,
        "wins": outcome.wins,
        "ties": outcome.ties,
        "losses": outcome.losses,
        "preference": preference_lines(result, campaign.info),
        "quality": quality_lines(replace(result, names=names)),
    }
