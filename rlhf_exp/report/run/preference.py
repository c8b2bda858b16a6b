"""What each judge says of two models, and how far the judges can be trusted.

More than two models: each against the baseline.

What people say of the answers: the votes so far, or how to get some.
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
    bar_of,
    outcome_bar,
    p_label,
    tiles_of,
    verdict_of,
    verdict_sentence,
)
from rlhf_exp.report.template import fill

_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class _Row:
    """A judge's line in the table of outcomes, in words."""

    judge: str
    counts: tuple[int, int, int]
    win_rate: str
    half: str
    p: str
    needed: str


@dataclass(frozen=True)
class _Trust:
    """How far one judge agrees with others, in words; the confusion's rows are the others'."""

    judge: str
    pairs: str
    agreement: str
    decided: str
    kappa: str
    alpha: str
    with_one: str
    confusion: tuple[tuple[int, ...], ...] = ()


def render_judges(plain: Mapping[str, Any]) -> Markup:
    """Return the section of a `judges.json`."""
    comparisons = [
        {
            "a": one["a"],
            "b": one["b"],
            "rows": [_row(judge) for judge in one["judges"]],
            "notes": [_note(judge) for judge in one["judges"] if "llm" in judge],
            "between": [(pair["first"], _trust(pair)) for pair in one["agreement"]],
        }
        for one in plain["comparisons"]
    ]
    found = plain["quality"]
    return fill(
        "run/judges.html",
        comparisons=comparisons,
        quality=found,
        people=None if found is None else HumanAgreement.from_json(found["people"]),
        ceiling=None if found is None else _ceiling(found["people"]),
        judges=[] if found is None else [_trust(judge) for judge in found["judges"]],
        sides=("a", "tie", "b"),
    )


def _row(judge: Mapping[str, Any]) -> _Row:
    found = judge["preference"]
    decided = found["wins"] + found["losses"]
    rate = DASH
    needed = DASH
    if decided:
        interval = found["win_rate_interval"]
        rate = _share(Estimate(found["win_rate"], interval["low"], interval["high"]))
        needed = f"more than {MOST_PAIRS:,}"
        if found["needed"] is not None:
            needed = f"{found['needed']:,} ({found['needed_prompts']:,})"
    return _Row(
        judge["judge"],
        (found["wins"], found["ties"], found["losses"]),
        rate,
        _share(estimate_from_json(found["ties_as_half"])),
        p_label(found["p_value"]),
        needed,
    )


def _note(judge: Mapping[str, Any]) -> str:
    """Return in words how an LLM judged."""
    found, usage = judge["llm"], judge["llm"]["usage"]
    place = found["first_place"]
    decided = place["first"] + place["second"]
    parts = [f"{found['consistent']} of {found['read']} pairs judged alike in both orders"]
    if decided:
        share, interval = place["first"] / decided, place["interval"]
        parts.append(
            f"the answer shown first won {_share(Estimate(share, **interval))} of {decided} "
            f"decided replies, {p_label(place['p_value'])}"
        )
    parts.append(
        f"{usage['prompt_tokens']:,} tokens read and {usage['completion_tokens']:,} written in "
        f"{usage['requests']:,} replies asked for and {usage['cached']:,} kept ones"
    )
    if usage["unparsed"]:
        parts.append(f"{usage['unparsed']} pairs without a readable verdict, counted as ties")
    return "; ".join(parts)


def _trust(plain: Mapping[str, Any]) -> _Trust:
    found = JudgeQuality.from_json(dict(plain))
    return _Trust(
        found.judge,
        f"{found.pairs:,}",
        _share(found.agreement),
        _share(found.decided),
        format_estimate(found.kappa, 2),
        format_estimate(found.alpha, 2),
        _share(found.with_one),
        found.confusion,
    )


def _ceiling(plain: Mapping[str, Any]) -> _Trust | None:
    """Return how far people agree with each other; nothing if no pair was judged twice."""
    found = HumanAgreement.from_json(dict(plain))
    if found.agreement is None:
        return None
    name, alpha = "two people", format_estimate(found.alpha, 2)
    return _Trust(name, f"{found.pairs:,}", DASH, DASH, DASH, alpha, _share(found.agreement))


def _share(estimate: Estimate | None) -> str:
    """Write a share and its interval in percent."""
    if estimate is None:
        return DASH
    scaled: Sequence[float] = (100 * estimate.mean, 100 * estimate.low, 100 * estimate.high)
    text = format_estimate(Estimate(*scaled), 1)
    mean, bracket, rest = text.partition(" [")
    return f"{mean}{_SPACE}%{bracket}{rest}" if mean != DASH else DASH


def render_comparisons(plain: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the comparisons, one below the other.

    Args:
        plain: What `ModelComparison.to_json` returned, of each model.
    """
    results = [ModelComparison.from_json(one) for one in plain]
    shown = [(one, verdict_sentence(one), outcome_bar(one), tiles_of(one)) for one in results]
    return fill("run/comparisons.html", comparisons=shown)


@dataclass(frozen=True)
class Question:
    """What was asked, and how it ended.

    Attributes:
        plain: Its standing.
        verdict: One sentence; empty without votes.
        bar: Wins, ties and losses; `None` without votes.
    """

    plain: Mapping[str, Any]
    verdict: str
    bar: Markup | None


def render_people(plain: Mapping[str, Any]) -> Markup:
    """Return the section's content.

    Args:
        plain: What the people part left, if it ran, with the `run` that was evaluated and its
            `studies` (`human.standing.standings`).
    """
    studies = [
        {
            "plain": study,
            "questions": [_question(found, study["names"]) for found in study["criteria"]],
            "tables": [
                (title, rows_of([found[part] for found in study["criteria"]]))
                for title, part in (("Votes", "preference"), ("The voting itself", "quality"))
            ],
        }
        for study in plain["studies"]
    ]
    return fill("run/people.html", plain=plain, studies=studies, power=round(100 * POWER))


def rows_of(columns: Sequence[Sequence[Sequence[str]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return a table's rows: what is told, and for each column its value and what is beside it.

    Args:
        columns: (name, value) by column; a name that a column lacks has a dash there.
    """
    values = [{one[0]: one[1] for one in column} for column in columns]
    names = dict.fromkeys(name for column in values for name in column)
    return [(name, [_apart(column.get(name, DASH)) for column in values]) for name in names]


def _question(found: Mapping[str, Any], names: Sequence[str]) -> Question:
    outcome = WinCounts(found["wins"], found["ties"], found["losses"])
    if outcome.total == 0:
        return Question(found, "", None)
    first, second = names
    return Question(
        found, verdict_of(outcome, found["p_value"], (first, second)), bar_of(outcome, second)
    )


def _apart(value: str) -> tuple[str, str]:
    """Return a value and the interval or condition that follows it."""
    for mark in (" (", ", ", " of "):
        place = value.find(mark)
        if place >= 0:
            place += mark.index(" ")  # a comma stays with the value
            return value[:place], value[place + 1 :]
    return value, ""
