"""A vote, as it was given on the screen and as it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.human.items import Item


class Choice(StrEnum):
    """What an annotator can answer; A is the answer shown first (left, or above)."""

    A = "A"
    tie = "Tie"
    B = "B"


@dataclass(frozen=True)
class Vote:
    """One annotator's answer to one question about one item.

    Attributes:
        item: the item's id.
        annotator: a name.
        criterion: what was asked.
        side: 0 if model a's answer was shown as A, 1 if as B.
        choice: what was chosen on the screen.
        seconds: from the page's delivery to the answer, by the server's clock; `None` if unknown.
        at: ISO 8601 time in UTC.
        revision: 1 for the first answer, one more for each change.
    """

    item: str
    annotator: str
    criterion: str
    side: int
    choice: Choice
    seconds: float | None
    at: str
    revision: int = 1

    @property
    def sign(self) -> int:
        """1 if model b was preferred, -1 if model a, 0 for a tie: the side resolved."""
        if self.choice is Choice.tie:
            return 0
        return 1 if (self.choice is Choice.A) == (self.side == 1) else -1

    @property
    def winner(self) -> str:
        """`a`, `b` or `tie`."""
        return {1: "b", 0: "tie", -1: "a"}[self.sign]


def choice_of(winner: str, side: int) -> Choice:
    """Return what was chosen on the screen; undoes `Vote.winner`.

    Raises:
        ValueError: `winner` is none of `a`, `b`, `tie`.
    """
    if winner == "tie":
        return Choice.tie
    if winner not in ("a", "b"):
        raise ValueError(f"winner {winner!r}; expected a, tie or b")
    return Choice.A if (winner == "a") == (side == 0) else Choice.B


def ratings(
    votes: Sequence[Vote], items: Sequence[Item], annotators: Sequence[str]
) -> NDArray[np.float64]:
    """Return the signs [items, annotators] of one criterion's votes, NaN where there is none."""
    rows = {item.id: row for row, item in enumerate(items)}
    columns = {name: column for column, name in enumerate(annotators)}
    table = np.full((len(items), len(annotators)), np.nan)
    for vote in votes:
        table[rows[vote.item], columns[vote.annotator]] = vote.sign
    return table
