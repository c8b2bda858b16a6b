"""What people say of the answers: the votes so far, or how to get some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.metric import DASH
from rlhf_exp.evaluation.preference import POWER
from rlhf_exp.evaluation.statistics import Outcome
from rlhf_exp.report.outcome import bar_of, verdict_of
from rlhf_exp.report.template import fill


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


def render(plain: Mapping[str, Any]) -> Markup:
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
    return fill("parts/people.html", plain=plain, studies=studies, power=round(100 * POWER))


def rows_of(columns: Sequence[Sequence[Sequence[str]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return a table's rows: what is told, and for each column its value and what is beside it.

    Args:
        columns: (name, value) by column; a name that a column lacks has a dash there.
    """
    values = [{one[0]: one[1] for one in column} for column in columns]
    names = dict.fromkeys(name for column in values for name in column)
    return [(name, [_apart(column.get(name, DASH)) for column in values]) for name in names]


def _question(found: Mapping[str, Any], names: Sequence[str]) -> Question:
    outcome = Outcome(found["wins"], found["ties"], found["losses"])
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
