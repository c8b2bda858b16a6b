"""The sections on preference: all comparisons, the judges, and the votes of people.

The judges' section shows each judge's outcome and how far the judges can be trusted. The
comparisons are those of each model with the baseline, if there are more than two models. The
people's section shows the votes so far, or how to get some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.evaluation.judges.human_agreement import HumanAgreement, JudgeQuality
from rlhf_exp.evaluation.preference import (
    DASH,
    MOST_PAIRS,
    POWER,
    estimate_from_json,
    format_estimate,
)
from rlhf_exp.evaluation.statistics import Estimate, WinCounts
from rlhf_exp.report.run.verdict import (
    PEOPLE,
    bar_of,
    outcome_bar,
    p_label,
    tiles_of,
    verdict_of,
    verdict_sentence,
)
from rlhf_exp.report.template import fill

_SPACE = "\N{NO-BREAK SPACE}"


def render_comparisons(plain: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the comparisons, one below the other.

    Args:
        plain: The value of `ModelComparison.to_json` for each model.
    """
    results = [ModelComparison.from_json(result) for result in plain]
    shown = [
        (result, verdict_sentence(result), outcome_bar(result), tiles_of(result))
        for result in results
    ]
    return fill("run/comparisons.html", comparisons=shown)


def render_judges(plain: Mapping[str, Any]) -> Markup:
    """Return the section of a `judges.json`."""
    comparisons = [
        {
            "a": comparison["a"],
            "b": comparison["b"],
            "rows": [_outcome_row(judge) for judge in comparison["judges"]],
            "notes": [_llm_note(judge) for judge in comparison["judges"] if "llm" in judge],
            "between": [(pair["first"], _agreement_row(pair)) for pair in comparison["agreement"]],
        }
        for comparison in plain["comparisons"]
    ]
    quality = plain["quality"]
    return fill(
        "run/judges.html",
        comparisons=comparisons,
        quality=quality,
        people=None if quality is None else HumanAgreement.from_json(quality["people"]),
        ceiling=None if quality is None else _people_row(quality["people"]),
        judges=[] if quality is None else [_agreement_row(judge) for judge in quality["judges"]],
        sides=("a", "tie", "b"),
    )


def _outcome_row(judge: Mapping[str, Any]) -> _OutcomeRow:
    preference = judge["preference"]
    decided = preference["wins"] + preference["losses"]
    rate = DASH
    needed = DASH
    if decided:
        interval = preference["win_rate_interval"]
        rate = _share(Estimate(preference["win_rate"], interval["low"], interval["high"]))
        needed = f"more than {MOST_PAIRS:,}"
        if preference["needed"] is not None:
            needed = f"{preference['needed']:,} ({preference['needed_prompts']:,})"
    return _OutcomeRow(
        judge["judge"],
        (preference["wins"], preference["ties"], preference["losses"]),
        rate,
        _share(estimate_from_json(preference["ties_as_half"])),
        p_label(preference["p_value"]),
        needed,
    )


def _llm_note(judge: Mapping[str, Any]) -> str:
    """Return the consistency, order bias and cost of an LLM judge, in words."""
    llm, usage = judge["llm"], judge["llm"]["usage"]
    first_place = llm["first_place"]
    decided = first_place["first"] + first_place["second"]
    parts = [f"{llm['consistent']} of {llm['read']} pairs judged alike in both orders"]
    if decided:
        share, interval = first_place["first"] / decided, first_place["interval"]
        parts.append(
            f"the answer shown first won {_share(Estimate(share, **interval))} of {decided} "
            f"decided replies, {p_label(first_place['p_value'])}"
        )
    parts.append(
        f"{usage['prompt_tokens']:,} tokens read and {usage['completion_tokens']:,} written in "
        f"{usage['requests']:,} replies asked for and {usage['cached']:,} kept ones"
    )
    if usage["unparsed"]:
        parts.append(f"{usage['unparsed']} pairs without a readable verdict, counted as ties")
    return "; ".join(parts)


def _agreement_row(plain: Mapping[str, Any]) -> _AgreementRow:
    agreement = JudgeQuality.from_json(dict(plain))
    return _AgreementRow(
        agreement.judge,
        f"{agreement.pairs:,}",
        _share(agreement.agreement),
        _share(agreement.decided),
        format_estimate(agreement.kappa, 2),
        format_estimate(agreement.alpha, 2),
        _share(agreement.with_one),
        agreement.confusion,
    )


def _people_row(plain: Mapping[str, Any]) -> _AgreementRow | None:
    """Return the agreement of people with each other; `None` if no pair was judged twice."""
    agreement = HumanAgreement.from_json(dict(plain))
    if agreement.agreement is None:
        return None
    name, alpha = "two people", format_estimate(agreement.alpha, 2)
    return _AgreementRow(
        name, f"{agreement.pairs:,}", DASH, DASH, DASH, alpha, _share(agreement.agreement)
    )


def _share(estimate: Estimate | None) -> str:
    """Write a share and its interval in percent."""
    if estimate is None:
        return DASH
    scaled: Sequence[float] = (100 * estimate.mean, 100 * estimate.low, 100 * estimate.high)
    text = format_estimate(Estimate(*scaled), 1)
    mean, bracket, rest = text.partition(" [")
    return f"{mean}{_SPACE}%{bracket}{rest}" if mean != DASH else DASH


@dataclass(frozen=True)
class _OutcomeRow:
    """A judge's line in the table of outcomes, in words."""

    judge: str
    counts: tuple[int, int, int]
    win_rate: str
    half: str
    p: str
    needed: str


@dataclass(frozen=True)
class _AgreementRow:
    """The agreement of one judge with others, in words; the confusion's rows are the others'."""

    judge: str
    pairs: str
    agreement: str
    decided: str
    kappa: str
    alpha: str
    with_one: str
    confusion: tuple[tuple[int, ...], ...] = ()


def render_people(plain: Mapping[str, Any]) -> Markup:
    """Return the section's content.

    Args:
        plain: The file of the people part, if it ran, with the `run` that was evaluated and its
            `studies` (`annotation.results.campaign_summaries`).
    """
    campaigns = [
        {
            "plain": campaign,
            "questions": [
                _question_outcome(criterion, campaign["names"])
                for criterion in campaign["criteria"]
            ],
            "tables": [
                (title, rows_of([criterion[part] for criterion in campaign["criteria"]]))
                for title, part in (("Votes", "preference"), ("The voting itself", "quality"))
            ],
        }
        for campaign in plain["studies"]
    ]
    return fill("run/people.html", plain=plain, campaigns=campaigns, power=round(100 * POWER))


@dataclass(frozen=True)
class QuestionOutcome:
    """A question to people, and its outcome.

    Attributes:
        plain: The result as `annotation.results.campaign_summaries` gives it.
        verdict: One sentence; empty without votes.
        bar: Wins, ties and losses; `None` without votes.
    """

    plain: Mapping[str, Any]
    verdict: str
    bar: Markup | None


def _question_outcome(criterion: Mapping[str, Any], names: Sequence[str]) -> QuestionOutcome:
    outcome = WinCounts(criterion["wins"], criterion["ties"], criterion["losses"])
    if outcome.total == 0:
        return QuestionOutcome(criterion, "", None)
    first, second = names
    return QuestionOutcome(
        criterion,
        verdict_of(outcome, criterion["p_value"], (first, second), PEOPLE),
        bar_of(outcome, second),
    )


def rows_of(columns: Sequence[Sequence[Sequence[str]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return a table's rows: a name, and for each column its value and the text beside it.

    Args:
        columns: (name, value) by column; a name that a column lacks has a dash there.
    """
    values = [{line[0]: line[1] for line in column} for column in columns]
    names = dict.fromkeys(name for column in values for name in column)
    return [(name, [_split_value(column.get(name, DASH)) for column in values]) for name in names]


def _split_value(value: str) -> tuple[str, str]:
    """Return a value and the interval or condition that follows it."""
    for mark in (" (", ", ", " of "):
        position = value.find(mark)
        if position >= 0:
            position += mark.index(" ")  # a comma stays with the value
            return value[:position], value[position + 1 :]
    return value, ""
