"""Votes as JSON lines, sides resolved: the format that other programs and other studies read.

One line a vote: `item`, `annotator`, `criterion`, `winner` (`a`, `tie` or `b`), the names and texts
of both sides, and how the vote came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_exp.data.jsonl import Unreadable, read_jsonl
from rlhf_exp.errors import UserError
from rlhf_exp.human.study import Study
from rlhf_exp.human.votes import Vote, choice_of
from rlhf_exp.store.files import write_text_atomic


def vote_lines(study: Study) -> str:
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


def write_votes(study: Study, path: Path) -> int:
    """Write all votes; return how many."""
    text = vote_lines(study)
    write_text_atomic(path, text)
    return text.count("\n")


def read_votes(study: Study, path: Path) -> list[Vote]:
    """Return the votes of a file that `write_votes` wrote, or of one with the same fields.

    Needed are `item`, `annotator` and `winner`.

    Raises:
        UserError: a line cannot be read, or is about an item or a criterion that the study lacks.
    """
    found = []
    for origin, record in read_jsonl(path, "--import jsonl"):
        if isinstance(record, Unreadable):
            raise UserError(f"{origin}: {record.reason}")
        try:
            found.append(_vote(study, record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{origin}: no vote of this study: {type(error).__name__}: {error}; expected item, "
                "annotator, criterion and winner as `--export jsonl` writes them"
            ) from error
    return found


def _vote(study: Study, record: Any) -> Vote:  # noqa: ANN401 - a line's JSON
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
