"""Validated text rows: what every source yields, before any tokenizer is known.

A *history* is a dialogue up to and including the human turn that asks for a response. Rows carry an
`origin` ("file:line", "toy:17"), so that whatever is wrong with one can be pointed at.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Role = Literal["human", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; `text` carries no marker and no surrounding white space."""

    role: Role
    text: str


History = tuple[Turn, ...]


@dataclass(frozen=True)
class Prompt:
    """A history to answer; `original` is the data set's own response, where it has one."""

    history: History
    original: str | None
    origin: str


@dataclass(frozen=True)
class Demonstration:
    """A history and a response to imitate."""

    history: History
    response: str
    origin: str


@dataclass(frozen=True)
class Preference:
    """A history and two responses, the first preferred to the second."""

    history: History
    chosen: str
    rejected: str
    origin: str


@dataclass(frozen=True)
class Rejected:
    """A row that could not be used, and why."""

    origin: str
    reason: str


Row = Prompt | Demonstration | Preference


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Three disjoint lists of rows; no prompt occurs in two of them."""

    train: list[T] = field(default_factory=list)
    validation: list[T] = field(default_factory=list)
    test: list[T] = field(default_factory=list)

    def all(self) -> Iterable[tuple[str, list[T]]]:
        """Return the splits with their names."""
        return (("train", self.train), ("validation", self.validation), ("test", self.test))


@dataclass(frozen=True)
class Corpus:
    """All that one source has to offer.

    Attributes:
        demonstrations: for SFT.
        preferences: for the reward model.
        prompts: for PPO (train) and evaluation (validation, test).
        rejected: the rows that could not be used.
        dropped: usable rows left out because their prompt belongs to another split.
        digest: sha256 of all rows' content, in order.
    """

    demonstrations: Splits[Demonstration]
    preferences: Splits[Preference]
    prompts: Splits[Prompt]
    rejected: list[Rejected]
    dropped: int
    digest: str


def make_corpus(
    demonstrations: Splits[Demonstration],
    preferences: Splits[Preference],
    prompts: Splits[Prompt],
    rejected: list[Rejected],
    dropped: int = 0,
) -> Corpus:
    """Return the corpus of these rows, with its digest."""
    digest = hashlib.sha256()
    for kind in (demonstrations, preferences, prompts):
        for name, rows in kind.all():
            digest.update(f"{name}:{rows_digest(rows)}\n".encode())
    return Corpus(demonstrations, preferences, prompts, rejected, dropped, digest.hexdigest())


def rows_digest(rows: Iterable[Row]) -> str:
    """Return the sha256 of the rows' content in order; where they came from does not count."""
    digest = hashlib.sha256()
    for row in rows:
        content = asdict(row)
        del content["origin"]
        line = json.dumps([type(row).__name__, content], sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def prompt_key(history: History) -> str:
    """Return the sha256 that decides a prompt's split.

    Case, white space and Unicode's compatible spellings are levelled first, so that near copies of
    one prompt cannot end up on both sides of a split.
    """
    turns = [
        f"{turn.role}:{' '.join(unicodedata.normalize('NFKC', turn.text).casefold().split())}"
        for turn in history
    ]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()
