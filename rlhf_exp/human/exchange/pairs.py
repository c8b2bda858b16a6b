"""Pairs as other services show them: with fixed sides, under names that tell nothing.

A service shows one text as answer A to all of its workers, so the side belongs to the pair and not
to the annotator. Which side that is stays in the study: a pair's name is a keyed hash of item and
side, and is looked up when the votes come back.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

from rlhf_exp.data.dialogue import turns_of
from rlhf_exp.human.items import Item, side_of
from rlhf_exp.human.study import Study
from rlhf_exp.human.votes import Choice, Vote

_SPEAKERS = {"Human": "Person", "Assistant": "Assistant", "": "Prompt"}
# What a service may call the choices: their values, or the texts beside the buttons.
_CHOICES = {"a": Choice.A, "answer a": Choice.A, "b": Choice.B, "answer b": Choice.B}
_CHOICES |= {"tie": Choice.tie}


@dataclass(frozen=True)
class Pair:
    """An item with its sides fixed.

    Attributes:
        name: its name outside.
        item: what is judged.
        side: 0 if model a's answer is shown as A, 1 if as B.
        votes: the study's votes that were given with these sides.
    """

    name: str
    item: Item
    side: int
    votes: tuple[Vote, ...] = ()

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation: author and text of each turn."""
        turns = turns_of(self.item.prompt)
        return [{"author": _SPEAKERS[role], "text": text} for role, text in turns]

    @property
    def answers(self) -> tuple[str, str]:
        """The texts shown as A and as B."""
        both = (self.item.answer_a, self.item.answer_b)
        return both[::-1] if self.side else both

    def by_annotator(self) -> dict[str, list[Vote]]:
        """Return the votes of each annotator."""
        found: dict[str, list[Vote]] = {}
        for vote in self.votes:
            found.setdefault(vote.annotator, []).append(vote)
        return found


def pairs_to_judge(study: Study) -> list[Pair]:
    """Return each item once, its side drawn by the seed."""
    return [_pair(study, item, side_of(study.about.seed, item.id, "")) for item in study.items]


def judged_pairs(study: Study) -> list[Pair]:
    """Return the pairs that have votes: an item twice, if it was shown both ways round."""
    votes: dict[tuple[str, int], list[Vote]] = {}
    for vote in study.votes():
        votes.setdefault((vote.item, vote.side), []).append(vote)
    return [
        _pair(study, item, side, tuple(votes[item.id, side]))
        for item in study.items
        for side in (0, 1)
        if (item.id, side) in votes
    ]


class Names:
    """Looks up what a pair's name stands for."""

    def __init__(self, study: Study) -> None:
        pairs = [_pair(study, item, side) for item in study.items for side in (0, 1)]
        self.study = study
        self._pairs = {pair.name: pair for pair in pairs}

    def vote(
        self,
        name: object,
        annotator: str,
        criterion: str,
        choice: object,
        seconds: Any = None,  # noqa: ANN401 - a value of foreign JSON
        at: object = None,
    ) -> Vote:
        """Return the vote that a service reports.

        Raises:
            ValueError: the pair, the criterion or the choice is unknown.
        """
        pair = self._pairs.get(str(name))
        if pair is None:
            raise ValueError(f"pair_id {name!r} is not of the study {self.study.path.name}")
        known = _CHOICES.get(str(choice).strip().casefold())
        if known is None:
            raise ValueError(f"choice {choice!r}; expected A, Tie or B")
        vote = Vote(
            item=pair.item.id,
            annotator=annotator,
            criterion=criterion,
            side=pair.side,
            choice=known,
            seconds=None if seconds is None else float(seconds),
            at=str(at or ""),
        )
        return self.study.checked(vote)


def _pair(study: Study, item: Item, side: int, votes: tuple[Vote, ...] = ()) -> Pair:
    content = json.dumps(["pair", item.id, side]).encode()
    name = hmac.new(bytes.fromhex(study.about.secret), content, "sha256").hexdigest()[:20]
    return Pair(name, item, side, votes)
