"""What people say of the answers: the votes so far, or how to get some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.preference import POWER
from rlhf_exp.evaluation.statistics import Outcome
from rlhf_exp.report.outcome import bar_of
from rlhf_exp.report.template import fill


def render(plain: Mapping[str, Any]) -> Markup:
    """Return the section's content.

    Args:
        plain: What the people part left, if it ran, with the `run` that was evaluated and its
            `studies` (`human.standing.standings`).
    """
    studies = [
        (study, [(found, _bar(found, study["names"][1])) for found in study["criteria"]])
        for study in plain["studies"]
    ]
    return fill("parts/people.html", plain=plain, studies=studies, power=round(100 * POWER))


def _bar(found: Mapping[str, Any], name: str) -> Markup | None:
    outcome = Outcome(found["wins"], found["ties"], found["losses"])
    return bar_of(outcome, name) if outcome.total else None
