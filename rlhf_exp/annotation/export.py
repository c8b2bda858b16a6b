"""Votes and pairs for other programs and services, and votes back from them.

As JSON lines, one a vote, sides resolved: `item`, `annotator`, `criterion`, `winner` (`a`, `tie` or
`b`), the names and texts of both sides, and the circumstances of the vote.

As preferences to train on: `data=hh_local data.preferences=FILE`.

As pairs for labelling services. A service shows one text as answer A to all of its workers, so the
side belongs to the pair and not to the annotator. The side stays in the campaign: a pair's name is
a keyed hash of item and side, and is looked up when the votes come back.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.annotation.campaign import (
    SPEAKERS,
    Campaign,
    Choice,
    Item,
    Vote,
    choice_of,
    display_side,
    ratings,
)
from rlhf_exp.data.jsonl import UnreadableLine, read_jsonl
from rlhf_exp.data.parsing import split_turns
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.agreement import majority
from rlhf_exp.store.atomic_files import write_text_atomic

# Services' names of the choices: their values, or the texts beside the buttons.
_CHOICES = {"a": Choice.A, "answer a": Choice.A, "b": Choice.B, "answer b": Choice.B}
_CHOICES |= {"tie": Choice.tie}


def write_votes(campaign: Campaign, path: Path) -> int:
    """Write all votes; return how many."""
    text = vote_lines(campaign)
    write_text_atomic(path, text)
    return text.count("\n")


def vote_lines(campaign: Campaign) -> str:
    """Return all votes as JSON lines."""
    items, info = {item.id: item for item in campaign.items}, campaign.info
    lines = []
    for vote in campaign.votes():
        item = items[vote.item]
        record = {
            "item": vote.item,
            "annotator": vote.annotator,
            "criterion": vote.criterion,
            "winner": vote.winner,
            "a": info.name_a,
            "b": info.name_b,
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


def read_votes(campaign: Campaign, path: Path) -> list[Vote]:
    """Return the votes of a file that `write_votes` wrote, or of one with the same fields.

    The fields `item`, `annotator` and `winner` are required.

    Raises:
        UserError: a line cannot be read, or the campaign lacks its item or criterion.
    """
    votes = []
    for origin, record in read_jsonl(path, "--import jsonl"):
        if isinstance(record, UnreadableLine):
            raise UserError(f"{origin}: {record.reason}")
        try:
            votes.append(_vote_of_record(campaign, record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{origin}: no vote of this study: {type(error).__name__}: {error}; expected item, "
                "annotator, criterion and winner as `--export jsonl` writes them"
            ) from error
    return votes


def _vote_of_record(campaign: Campaign, record: Any) -> Vote:  # noqa: ANN401 - a line's JSON
    if not isinstance(record, Mapping):
        raise TypeError(f"a JSON object was expected, found {type(record).__name__}")
    criterion = record.get("criterion", campaign.info.criteria[0])
    side = "ab".index(record.get("first", "a"))
    seconds = record.get("seconds")
    return campaign.check_vote(
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
    """Numbers of preferences, of ties (left out), and of items without a vote."""

    preferences: int
    ties: int
    open: int


def write_preferences(campaign: Campaign, path: Path, criterion: str) -> ExportCounts:
    """Write prompt, chosen and rejected answer of each item that a majority decided.

    Raises:
        UserError: the campaign compares models on evaluation prompts, or decided nothing.
    """
    if not campaign.info.collect:
        raise UserError(
            f"{campaign.path}: its prompts are those of the evaluation, and what is trained on "
            "them can no longer be evaluated; gather preferences by `rlhf-exp annotate RUN "
            "--collect`"
        )
    names = [annotator.name for annotator in campaign.annotators()]
    votes = [vote for vote in campaign.votes() if vote.criterion == criterion]
    table = ratings(votes, campaign.items, names)
    judged = (~np.isnan(table)).any(axis=1)
    verdicts = majority(table)
    lines = []
    for item, row, verdict in zip(campaign.items, table, verdicts, strict=True):
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
        raise UserError(f"{campaign.path}: no item has a majority for {criterion} yet")
    write_text_atomic(path, "".join(lines))
    ties = int((judged & (verdicts == 0)).sum())
    return ExportCounts(len(lines), ties, int((~judged).sum()))


@dataclass(frozen=True)
class LabelledPair:
    """An item with its sides fixed.

    Attributes:
        name: its name outside.
        item: the prompt with its answers.
        side: 0 if model a's answer is shown as A, 1 if as B.
        votes: the campaign's votes that were given with these sides.
    """

    name: str
    item: Item
    side: int
    votes: tuple[Vote, ...] = ()

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation: author and text of each turn."""
        turns = split_turns(self.item.prompt)
        return [{"author": SPEAKERS[role], "text": text} for role, text in turns]

    @property
    def answers(self) -> tuple[str, str]:
        """The texts shown as A and as B."""
        both = (self.item.answer_a, self.item.answer_b)
        return both[::-1] if self.side else both

    def by_annotator(self) -> dict[str, list[Vote]]:
        """Return the votes of each annotator."""
        votes: dict[str, list[Vote]] = {}
        for vote in self.votes:
            votes.setdefault(vote.annotator, []).append(vote)
        return votes


def pairs_to_judge(campaign: Campaign) -> list[LabelledPair]:
    """Return each item once, its side drawn by the seed."""
    return [
        _pair(campaign, item, display_side(campaign.info.seed, item.id, ""))
        for item in campaign.items
    ]


def judged_pairs(campaign: Campaign) -> list[LabelledPair]:
    """Return the pairs that have votes: an item twice, if it was shown both ways round."""
    votes: dict[tuple[str, int], list[Vote]] = {}
    for vote in campaign.votes():
        votes.setdefault((vote.item, vote.side), []).append(vote)
    return [
        _pair(campaign, item, side, tuple(votes[item.id, side]))
        for item in campaign.items
        for side in (0, 1)
        if (item.id, side) in votes
    ]


class PairNames:
    """Looks up pairs by their names outside."""

    def __init__(self, campaign: Campaign) -> None:
        pairs = [_pair(campaign, item, side) for item in campaign.items for side in (0, 1)]
        self.campaign = campaign
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
            raise ValueError(f"pair_id {name!r} is not of the study {self.campaign.path.name}")
        known_choice = _CHOICES.get(str(choice).strip().casefold())
        if known_choice is None:
            raise ValueError(f"choice {choice!r}; expected A, Tie or B")
        vote = Vote(
            item=pair.item.id,
            annotator=annotator,
            criterion=criterion,
            side=pair.side,
            choice=known_choice,
            seconds=None if seconds is None else float(seconds),
            at=str(at or ""),
        )
        return self.campaign.check_vote(vote)


def _pair(campaign: Campaign, item: Item, side: int, votes: tuple[Vote, ...] = ()) -> LabelledPair:
    content = json.dumps(["pair", item.id, side]).encode()
    name = hmac.new(bytes.fromhex(campaign.info.secret), content, "sha256").hexdigest()[:20]
    return LabelledPair(name, item, side, votes)
