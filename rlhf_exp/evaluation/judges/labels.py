"""Files of pairs that people have judged.

Read are JSON lines, a JSON list, or gzip of either, in any of these forms:

- votes as `rlhf-exp annotate --export jsonl` writes them: `prompt`, `answer_a`, `answer_b`,
  `winner` (`a`, `tie` or `b`), and `annotator` where there are several; one line a vote;
- several annotators in one row, as in PandaLM's test set: `instruction`, `input`, `response1`,
  `response2`, and `annotator1`, `annotator2`, ... with 0 for a tie, 1 or 2;
- preference data: `chosen` and `rejected`, with or without `prompt`. Which one is shown as a is
  drawn by a hash of the texts, because a judge must not be right by always saying the same.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.data.formats import parse_row
from rlhf_exp.data.hh import dialogue
from rlhf_exp.data.jsonl import Unreadable, read_jsonl
from rlhf_exp.data.rows import Preference
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.judge import Pair

_WINNERS = {"a": -1.0, "tie": 0.0, "b": 1.0}
_NUMBERS = {0: 0.0, 1: -1.0, 2: 1.0}
_ANNOTATOR = re.compile(r"annotator_?\d+")
_FORMS = (
    "prompt, answer_a, answer_b and winner; or instruction, response1, response2 and annotator1, "
    "...; or chosen and rejected"
)


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs that R people have judged.

    Attributes:
        pairs: what was judged.
        ratings: [N, R] signs: 1 where b was preferred, 0 for a tie, -1 for a, NaN for no judgment.
        annotators: the names of the R people.
        unusable: rows of preference data that are no pair of answers to one prompt.
    """

    pairs: tuple[Pair, ...]
    ratings: NDArray[np.float64]
    annotators: tuple[str, ...]
    unusable: int = 0

    def first(self, count: int | None) -> JudgedPairs:
        """Return the first `count` pairs; all of them for `None`."""
        kept = self.pairs[:count]
        return JudgedPairs(kept, self.ratings[: len(kept)], self.annotators, self.unusable)


def read_judged(path: Path, option: str, criterion: str | None = None) -> JudgedPairs:
    """Read a file of judged pairs.

    Args:
        path: the file.
        option: the config key or option that named it, for errors.
        criterion: of votes on several questions, the one that counts; by default the first found.

    Raises:
        UserError: the file cannot be read, or a row has none of the known forms.
    """
    votes: dict[tuple[Pair, str], dict[str, float]] = {}
    unusable = 0
    for origin, record in _records(path, option):
        if isinstance(record, Unreadable):
            raise UserError(f"{origin}: {record.reason}")
        if not isinstance(record, Mapping):
            raise UserError(f"{origin}: found {type(record).__name__}; expected {_FORMS}")
        if "criterion" in record:
            criterion = criterion or str(record["criterion"])
            if record["criterion"] != criterion:
                continue
        if "chosen" in record and "rejected" in record:
            found = _preferred(record, origin)
            unusable += found is None
        else:
            found = _votes(record, origin)
        if found is not None:
            pair, said = found
            # Votes on one pair stand on several lines; any other row is a pair of its own.
            row = "" if "winner" in record else origin
            votes.setdefault((pair, row), {}).update(said)
    if not votes:
        about = f" on {criterion!r}" if criterion else ""
        raise UserError(f"{option}: {path} has no judged pairs{about}; expected {_FORMS}")
    names = sorted({name for said in votes.values() for name in said}, key=_natural)
    ratings = [[said.get(name, np.nan) for name in names] for said in votes.values()]
    return JudgedPairs(tuple(pair for pair, _ in votes), np.array(ratings), tuple(names), unusable)


def _records(path: Path, option: str) -> Iterator[tuple[str, object]]:
    if path.is_file():
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
                start = handle.read(100).lstrip()
                if start.startswith(b"["):
                    handle.seek(0)
                    rows = enumerate(json.load(handle), 1)
                    yield from ((f"{path}: row {number}", row) for number, row in rows)
                    return
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{option}: {path} cannot be read: {error}") from error
    yield from read_jsonl(path, option)


def _votes(record: Mapping[str, Any], origin: str) -> tuple[Pair, dict[str, float]]:
    try:
        if "winner" in record:
            texts = [record[name] for name in ("prompt", "answer_a", "answer_b")]
            said = {str(record.get("annotator", "annotator")): _WINNERS[record["winner"]]}
        else:
            asked = [record["instruction"], record.get("input") or ""]
            prompt = "\n\n".join(text.strip() for text in asked if text.strip())
            texts = [prompt, *(_cell(record[name]) for name in ("response1", "response2"))]
            names = [name for name in record if _ANNOTATOR.fullmatch(name)]
            said = {n: _NUMBERS[record[n]] for n in names if record[n] is not None}
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{origin}: {type(error).__name__} {error}; expected {_FORMS}") from error
    if not said or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{origin}: a text or the judgment is missing; expected {_FORMS}")
    return Pair(*texts), said


def _preferred(record: Mapping[str, Any], origin: str) -> tuple[Pair, dict[str, float]] | None:
    try:
        row = parse_row(record, origin)
    except ValueError:
        return None
    assert isinstance(row, Preference)
    texts = [dialogue(row.history), *sorted((row.chosen, row.rejected))]
    b_is_chosen = hashlib.sha256(json.dumps(texts).encode()).digest()[0] & 1 == 1
    answers = (row.rejected, row.chosen) if b_is_chosen else (row.chosen, row.rejected)
    return Pair(texts[0], *answers), {"annotator": 1.0 if b_is_chosen else -1.0}


def _cell(value: object) -> object:
    """Return the text that a spreadsheet took for a number or a truth value."""
    return str(value) if isinstance(value, bool | int | float) else value


def _natural(name: str) -> tuple[str, int]:
    """Sort annotator10 after annotator9."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)
