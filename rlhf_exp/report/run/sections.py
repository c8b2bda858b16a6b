"""The sections that parts of an evaluation add to the report, each from the file of its part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf_exp.report.run import best_of, harness, preference, reward_quality, toxicity
from rlhf_exp.report.run.verdict import JUDGES, PEOPLE_FILE

COMPARISONS = "comparisons.json"
"""File with the comparison of each model with the baseline, if there are three or more models."""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Its anchor.
        title: Its heading.
        file: The JSON file in the evaluation's artifact that it shows.
        render: Returns the section's content, without the heading, from the file's value.
    """

    name: str
    title: str
    file: str
    render: Callable[[Any], Markup]


SECTIONS = (
    Section("comparisons", "All models", COMPARISONS, preference.render_comparisons),
    Section("best-of-n", "Best of n", best_of.BEST_OF_FILE, best_of.render),
    Section("judges", "Judges", JUDGES, preference.render_judges),
    Section("toxicity", "Toxicity", toxicity.TOXICITY_FILE, toxicity.render),
    Section(
        "reward-quality", "Reward model", reward_quality.REWARD_QUALITY_FILE, reward_quality.render
    ),
    Section("capability", "Capability", harness.HARNESS_FILE, harness.render),
    Section("people", "People", PEOPLE_FILE, preference.render_people),
)


def sections_of(parts: Mapping[str, Any]) -> list[tuple[Section, Markup]]:
    """Return the sections whose file the evaluation left, with their content.

    Args:
        parts: The JSON value of each file that the evaluation left.
    """
    return [
        (section, section.render(parts[section.file]))
        for section in SECTIONS
        if section.file in parts
    ]
