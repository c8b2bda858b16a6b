"""What a judge said about two models, as plain values: `judges.json` of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from numpy.typing import ArrayLike

from rlhf_exp.evaluation.judges.judge import Verdict
from rlhf_exp.evaluation.judges.llm import Usage, consistent, first_place
from rlhf_exp.evaluation.judges.quality import Quality, quality
from rlhf_exp.evaluation.metric import estimate_to_json
from rlhf_exp.evaluation.preference import Preference, preference
from rlhf_exp.evaluation.statistics import LEVEL


@dataclass(frozen=True)
class Judgment:
    """One judge's verdicts on the answers of two models to N prompts.

    Attributes:
        kind: `reward`, `model` or `llm`.
        judge: the judge's name.
        verdicts: [N].
        preference: what they amount to.
        usage: of a language model.
    """

    kind: str
    judge: str
    verdicts: tuple[Verdict, ...]
    preference: Preference
    usage: Usage | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        judge: str,
        verdicts: Sequence[Verdict],
        seed: int = 0,
        level: float = LEVEL,
        usage: Usage | None = None,
    ) -> Judgment:
        """Summarise verdicts."""
        found = preference([verdict.sign for verdict in verdicts], None, seed, level)
        return cls(kind, judge, tuple(verdicts), found, usage)

    @property
    def signs(self) -> list[int]:
        """The verdicts as signs [N]."""
        return [verdict.sign for verdict in self.verdicts]

    def scalars(self) -> dict[str, float]:
        """Return the main numbers under short names, for trackers."""
        found = self.preference
        half = found.ties_as_half
        scalars: dict[str, float] = {
            "wins": found.outcome.wins,
            "ties": found.outcome.ties,
            "losses": found.outcome.losses,
            "p_value": found.p_value,
        }
        if found.outcome.decided:
            scalars["win_rate"] = found.outcome.win_rate
        if half is not None:
            scalars["ties_as_half"] = half.mean
        if self.usage is not None:
            scalars["tokens"] = self.usage.prompt_tokens + self.usage.completion_tokens
            scalars["unparsed"] = self.usage.unparsed
            bias, (same, both) = first_place(self.verdicts), consistent(self.verdicts)
            if bias.first + bias.second:
                scalars["first_place"] = bias.share
            if both:
                scalars["consistent"] = same / both
        return {name: float(value) for name, value in scalars.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain: dict[str, Any] = {
            "kind": self.kind,
            "judge": self.judge,
            "preference": preference_to_json(self.preference),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }
        if self.usage is not None:
            same, both = consistent(self.verdicts)
            bias = first_place(self.verdicts)
            plain["llm"] = {
                "usage": asdict(self.usage),
                "consistent": same,
                "read": both,
                "first_place": {
                    "first": bias.first,
                    "second": bias.second,
                    "p_value": bias.p_value,
                    "interval": asdict(bias.interval),
                },
            }
        return plain


def preference_to_json(found: Preference) -> dict[str, Any]:
    """Return plain values."""
    return {
        "wins": found.outcome.wins,
        "ties": found.outcome.ties,
        "losses": found.outcome.losses,
        "p_value": found.p_value,
        "win_rate": found.outcome.win_rate if found.outcome.decided else None,
        "win_rate_interval": asdict(found.win_rate),
        "ties_as_half": estimate_to_json(found.ties_as_half),
        "needed": found.needed,
        "needed_prompts": found.needed_prompts,
    }


def compare_judges(judgments: Sequence[Judgment], seed: int = 0) -> list[dict[str, Any]]:
    """Return how far every two judges agree, the first in the place of the people."""
    return [
        {"first": one.judge, **quality(other.judge, other.signs, _column(one), seed).to_json()}
        for one, other in combinations(judgments, 2)
    ]


def against_people(
    comparison: Mapping[str, Any], ratings: ArrayLike, seed: int = 0, level: float = LEVEL
) -> list[Quality]:
    """Return how far each judge of a run agrees with people who judged the same answers.

    Args:
        comparison: one of the `comparisons` of a `judges.json`.
        ratings: [N, R] people's signs, rows in the order of the verdicts, NaN where there is none.
        seed: of the bootstrap.
        level: of the intervals.
    """
    return [
        quality(one["judge"], [v["sign"] for v in one["verdicts"]], ratings, seed, level)
        for one in comparison["judges"]
    ]


def _column(judgment: Judgment) -> list[list[float]]:
    return [[float(sign)] for sign in judgment.signs]
