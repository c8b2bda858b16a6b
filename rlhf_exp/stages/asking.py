"""Who is asked what in an evaluation, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp.config.evaluation import ROLES
from rlhf_exp.data.rows import History
from rlhf_exp.stages.context import StageContext

DIALOGUE = "dialogue"
"""Fact of a prompt: the whole dialogue with HH's markers, for judges that are no policy's kin."""


@dataclass(frozen=True)
class Contestant:
    """A model under evaluation.

    Attributes:
        name: What tables call it.
        source: Folder or hub id; empty where only its answers are known.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        history: A dialogue, to be written in the run's prompt format.
        text: A text to be continued as it is, instead of a dialogue.
        facts: What the data say of the prompt, JSON values; kept with its first answer.
    """

    history: History | None = None
    text: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manner:
    """How to answer.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token.
        top_p: What the tokens that can be drawn add up to, the most probable ones first.
        top_k: How many tokens can be drawn, the most probable ones; 0 for all.
        seed: Of the noise, which is the same for every model.
        count: Answers to each prompt.
        score: Whether answers get their reward.
        referee: Whether they get that of the second reward model too, if there is one.
        kl: Whether answers get their KL to the baseline, where the tokenizers are the same and
            every token can be drawn.
        stop: Whether the prompt format's stop strings end an answer.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    count: int = 1
    score: bool = False
    referee: bool = False
    kl: bool = False
    stop: bool = True

    @property
    def sampling(self) -> dict[str, float | int]:
        """How the tokens are drawn, as it is kept with the answers."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


def contestants_of(context: StageContext, specs: Sequence[str]) -> tuple[Contestant, ...]:
    """Return the models of a config's `eval.models`, by names that differ."""
    found: list[Contestant] = []
    for spec in specs:
        name = spec.upper() if spec in ROLES else Path(spec).name or spec
        taken = {one.name for one in found}
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        found.append(Contestant(unique, context.models[spec]))
    return tuple(found)
