"""What a study's votes say so far: preference, agreement, sides, progress.

Results as lines of text, the same for the terminal and the owner's page.

What people have said of an evaluation so far, as plain values for its report.
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


@dataclass(frozen=True)
class AnnotatorProgress:
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
class Results:
    """A study's votes so far."""

    items: int
    progress: tuple[AnnotatorProgress, ...]
    criteria: tuple[CriterionResult, ...]


def results(study: Campaign) -> Results:
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
        preference=summarise_preference(signs, values, seed),
        names=names,
        agreement=tuple(pairwise_agreement(table)),
        alpha=krippendorff_alpha(table),
        alpha_ordinal=krippendorff_alpha(table, "ordinal"),
        sides=side_bias(first, second),
    )


def _progress(name: str, votes: Sequence[Vote], criteria: int) -> AnnotatorProgress:
    own = [vote for vote in votes if vote.annotator == name]
    answers: dict[str, int] = {}
    for vote in own:
        answers[vote.item] = answers.get(vote.item, 0) + 1
    times = [vote.seconds for vote in own if vote.seconds is not None]
    whole = sum(count == criteria for count in answers.values())
    return AnnotatorProgress(name, whole, median(times) if times else math.nan)


Lines = list[tuple[str, str]]


def preference_lines(found: CriterionResult, about: CampaignInfo) -> Lines:
    """Return (name, value) of what the votes on one question say about the models."""
    told = found.preference
    outcome, half = told.outcome, told.ties_as_half
    if outcome.total == 0 or half is None:
        return [("Prompts", "none judged yet")]
    by = f"{found.judged} by people"
    if found.identical:
        by += f", {found.identical} with identical answers, counted as ties"
    at_least = outcome.wins + outcome.ties
    net = 100 * (outcome.wins - outcome.losses) / outcome.total
    lines = [
        ("Prompts", f"{outcome.total} ({by})"),
        (f"{about.name_b} better", _share(outcome.wins, outcome.total)),
        ("Tie", _share(outcome.ties, outcome.total)),
        (f"{about.name_a} better", _share(outcome.losses, outcome.total)),
        (f"{about.name_b} at least as good", _share(at_least, outcome.total)),
        ("Net", f"{net:+.1f} points"),
        ("Exact sign test", f"p = {told.p_value:.3g}, ties left out"),
        ("Win rate among decided", _with(outcome.win_rate, told.win_rate, "Clopper-Pearson")),
        ("Ties as half", _with(half.mean, Interval(half.low, half.high), "bootstrap over prompts")),
    ]
    if told.needed is not None:
        lines.append(
            (
                f"Needed for {100 * POWER:.0f} % power",
                f"{told.needed} decided prompts, about {told.needed_prompts} in all, "
                "if the effect is the one found",
            )
        )
    return lines


def quality_lines(found: CriterionResult) -> Lines:
    """Return (name, value) of what the votes say about the voting."""
    sides = found.sides
    lines = [("Votes", str(found.votes))]
    if len(found.names) > 1:
        lines.append(("Agreement of two annotators", _percent(found.mean_agreement)))
        for pair in found.agreement:
            who = f"{found.names[pair.first]} and {found.names[pair.second]}"
            lines.append((who, f"{_percent(pair.share)} of {pair.both} prompts"))
        lines.append(("Krippendorff's alpha, nominal", _number(found.alpha)))
        lines.append(("Krippendorff's alpha, ordinal", _number(found.alpha_ordinal)))
    if sides.first + sides.second:
        share = _with(sides.share, sides.interval, "Clopper-Pearson")
        lines.append(("Answer A chosen", f"{share}; p = {sides.p_value:.3g} for no side bias"))
    return lines


def _with(value: float, interval: Interval, kind: str) -> str:
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


def standings(folder: Path, source: str) -> list[dict[str, Any]]:
    """Return the votes on one evaluation, study by study, as JSON values.

    Annotators are numbered: a report goes further than the study's own page.

    Args:
        folder: Where studies are.
        source: What their answers come from, such as `eval/KEY`.
    """
    found = []
    for path in sorted(folder.glob("*.sqlite")):
        try:
            study = Campaign(path)
        except UserError:
            continue  # of whatever evaluation it is; `rlhf-exp annotate` says what is wrong with it
        if study.about.source == source and not study.about.collect:
            found.append(_standing(study))
    return found


def _standing(study: Campaign) -> dict[str, Any]:
    about, votes = study.about, study.votes()
    results = [
        criterion_result(
            criterion,
            [vote for vote in votes if vote.criterion == criterion],
            study.items,
            about.identical,
            about.seed,
        )
        for criterion in about.criteria
    ]
    return {
        "study": study.path.stem,
        "names": [about.name_a, about.name_b],
        "prompts": len(study.items) + about.identical,
        "criteria": [_plain(one, study) for one in results],
    }


def _plain(found: CriterionResult, study: Campaign) -> dict[str, Any]:
    names = tuple(f"annotator {number}" for number in range(1, len(found.names) + 1))
    outcome = found.preference.outcome
    return {
        "criterion": found.criterion,
        "question": question(found.criterion),
        "voters": len(found.names),
        "p_value": found.preference.p_value,
        "wins": outcome.wins,
        "ties": outcome.ties,
        "losses": outcome.losses,
        "preference": preference_lines(found, study.about),
        "quality": quality_lines(replace(found, names=names)),
    }
