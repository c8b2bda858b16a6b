"""Pairs as other services show them: with fixed sides, under names that tell nothing.

A service shows one text as answer A to all of its workers, so the side belongs to the pair and not
to the annotator. Which side that is stays in the study: a pair's name is a keyed hash of item and
side, and is looked up when the votes come back.

Votes as JSON lines, sides resolved: the format that other programs and other studies read.

One line a vote: `item`, `annotator`, `criterion`, `winner` (`a`, `tie` or `b`), the names and texts
of both sides, and how the vote came about.

Votes as preferences to train on: `data=hh_local data.preferences=FILE`.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.annotation.campaign import Campaign, Choice, Item, Vote, choice_of, ratings, side_of
from rlhf_exp.data.parsing import UnreadableLine, read_jsonl, split_turns
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.agreement import majority
from rlhf_exp.store.atomic_files import write_text_atomic

_SPEAKERS = {"Human": "Person", "Assistant": "Assistant", "": "Prompt"}
# What a service may call the choices: their values, or the texts beside the buttons.
_CHOICES = {"a": Choice.A, "answer a": Choice.A, "b": Choice.B, "answer b": Choice.B}
_CHOICES |= {"tie": Choice.tie}


@dataclass(frozen=True)
class LabelledPair:
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
        turns = split_turns(self.item.prompt)
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


def pairs_to_judge(study: Campaign) -> list[LabelledPair]:
    """Return each item once, its side drawn by the seed."""
    return [_pair(study, item, side_of(study.about.seed, item.id, "")) for item in study.items]


def judged_pairs(study: Campaign) -> list[LabelledPair]:
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

    def __init__(self, study: Campaign) -> None:
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


def _pair(study: Campaign, item: Item, side: int, votes: tuple[Vote, ...] = ()) -> LabelledPair:
    content = json.dumps(["pair", item.id, side]).encode()
    name = hmac.new(bytes.fromhex(study.about.secret), content, "sha256").hexdigest()[:20]
    return LabelledPair(name, item, side, votes)


def vote_lines(study: Campaign) -> str:
    """Return all votes as JSON lines."""
    items, about = {item.id: item for item in study.items}, study.about
    lines = []
    for vote in study.votes():
        item = items[vote.item]
        record = {
            "item": vote.item,
            "annotator": vote.annotator,
            "criterion": vote.criterion,
            "winner": vote.winner,
            "a": about.name_a,
            "b": about.name_b,
            "prompt": item.prompt,
            "answer_a": item.answer_a,
            "answer_b": item.answer_b,
            "first": "ab"[vote.side],
            "seconds": vote.seconds,
            "at": vote.at,
            "revision": vote.revision,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_votes(study: Campaign, path: Path) -> int:
    """Write all votes; return how many."""
    text = vote_lines(study)
    write_text_atomic(path, text)
    return text.count("\n")


def read_votes(study: Campaign, path: Path) -> list[Vote]:
    """Return the votes of a file that `write_votes` wrote, or of one with the same fields.

    Needed are `item`, `annotator` and `winner`.

    Raises:
        UserError: a line cannot be read, or is about an item or a criterion that the study lacks.
    """
    found = []
    for origin, record in read_jsonl(path, "--import jsonl"):
        if isinstance(record, UnreadableLine):
            raise UserError(f"{origin}: {record.reason}")
        try:
            found.append(_vote(study, record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{origin}: no vote of this study: {type(error).__name__}: {error}; expected item, "
                "annotator, criterion and winner as `--export jsonl` writes them"
            ) from error
    return found


def _vote(study: Campaign, record: Any) -> Vote:  # noqa: ANN401 - a line's JSON
    if not isinstance(record, Mapping):
        raise TypeError(f"a JSON object was expected, found {type(record).__name__}")
    criterion = record.get("criterion", study.about.criteria[0])
    side = "ab".index(record.get("first", "a"))
    seconds = record.get("seconds")
    return study.checked(
        Vote(
            item=str(record["item"]),
            annotator=str(record["annotator"]),
            criterion=str(criterion),
            side=side,
            choice=choice_of(record["winner"], side),
            seconds=None if seconds is None else float(seconds),
            at=str(record.get("at", "")),
            revision=int(record.get("revision", 1)),
        )
    )


@dataclass(frozen=True)
class ExportCounts:
    """What became of the items: preferences, ties (left out), and items without a vote."""

    preferences: int
    ties: int
    open: int


def write_preferences(study: Campaign, path: Path, criterion: str) -> ExportCounts:
    """Write prompt, chosen and rejected answer of each item that a majority decided.

    Raises:
        UserError: the study compares models on evaluation prompts, or decided nothing.
    """
    if not study.about.collect:
        raise UserError(
            f"{study.path}: its prompts are those of the evaluation, and what is trained on them "
            "can no longer be evaluated; gather preferences by `rlhf-exp annotate RUN --collect`"
        )
    names = [annotator.name for annotator in study.annotators()]
    votes = [vote for vote in study.votes() if vote.criterion == criterion]
    table = ratings(votes, study.items, names)
    judged = (~np.isnan(table)).any(axis=1)
    verdicts = majority(table)
    lines = []
    for item, row, verdict in zip(study.items, table, verdicts, strict=True):
        if verdict == 0:
            continue
        answers = (item.answer_b, item.answer_a) if verdict > 0 else (item.answer_a, item.answer_b)
        record = {
            "prompt": item.prompt,
            "chosen": answers[0],
            "rejected": answers[1],
            "item": item.id,
            "votes_for": int((row == verdict).sum()),
            "votes": int((~np.isnan(row)).sum()),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{study.path}: no item has a majority for {criterion} yet")
    write_text_atomic(path, "".join(lines))
    ties = int((judged & (verdicts == 0)).sum())
    return ExportCounts(len(lines), ties, int((~judged).sum()))
