"""The interface of a judge: says which of two answers to a prompt is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class AnswerPair:
    """A prompt and the answers of models a and b.

    Attributes:
        prompt: text; a dialogue with HH's markers, or anything else, read as one human turn.
        answer_a: the baseline's answer.
        answer_b: the other model's answer.
    """

    prompt: str
    answer_a: str
    answer_b: str

    @property
    def identical(self) -> bool:
        """Whether both answers are the same to a reader."""
        return self.answer_a.strip() == self.answer_b.strip()


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one pair.

    Attributes:
        sign: 1 if b is preferred, -1 if a, 0 for a tie.
        probability: probability that b is preferred, if the judge gives one.
        reason: the judge's reasons in its own words, if it gives any.
        orders: signs of the replies with a shown first, and with b shown first; `None` if the judge
            sees no order, or a reply could not be read.
        unparsed: whether the judge replied without a readable verdict, which counts as a tie.
    """

    sign: int
    probability: float | None = None
    reason: str | None = None
    orders: tuple[int | None, int | None] | None = None
    unparsed: bool = False


class Judge(Protocol):
    """Anything that judges pairs."""

    @property
    def name(self) -> str:
        """The judge's name in reports."""
        ...

    def verdicts(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """Return a verdict on each pair, in order."""
        ...
