"""A campaign: items for people to judge, annotators, and every vote, in one SQLite file.

A vote is on the disk before `record` returns. The file holds the annotators' tokens and the sides
of the models, so only its owner may read it. Every use opens its own connection, so that threads
and processes can share the file.

An item is a prompt with two answers, pinned by a hash of its text. The side and the order in which
an annotator sees items are functions of a seed, so that nothing has to be stored to show the same
page again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.data.jsonl import UnreadableLine, read_jsonl
from rlhf_exp.errors import UserError

NAME_LENGTH = 100
CAMPAIGNS = "human"
"""Folder of campaigns in the output folder."""
TEXTS = ("prompt", "answer_a", "answer_b")
SPEAKERS = {"System": "System", "Human": "Person", "Assistant": "Assistant", "": "Prompt"}
"""The names that people read for the roles of a dialogue; plain text has no role."""
CRITERION = re.compile(r"[a-z][a-z0-9_-]{0,30}")
INSTRUCTIONS = "\n\n".join(
    (
        "You will see conversations between a person and an assistant, each with two possible "
        "answers to the person's last message. Say which answer you prefer.",
        "Read the whole conversation and both answers first. Judge what an answer says and how: "
        "whether it helps with what was asked, whether it is true, and whether it could do harm. "
        "A longer answer is not better because it is longer.",
        "Choose a tie where you cannot prefer one of them: both are equally good, or equally bad.",
        "Some texts are offensive, and some make no sense. They were written by computer programs. "
        "You may stop at any time: answers are saved one by one, and your link brings you back.",
    )
)
_TOKEN_BYTES = 24
_VOTE_COLUMNS = "item, annotator, criterion, side, choice, seconds, at, revision"
FORMAT = 1
# Seconds that a writer waits for another one.
BUSY_S = 30.0
SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE about (content TEXT NOT NULL);
CREATE TABLE items (
    id TEXT PRIMARY KEY, prompt TEXT NOT NULL, answer_a TEXT NOT NULL, answer_b TEXT NOT NULL
);
CREATE TABLE annotators (name TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE votes (
    item TEXT NOT NULL REFERENCES items (id),
    annotator TEXT NOT NULL REFERENCES annotators (name),
    criterion TEXT NOT NULL,
    side INTEGER NOT NULL CHECK (side IN (0, 1)),
    choice TEXT NOT NULL CHECK (choice IN ('A', 'Tie', 'B')),
    seconds REAL,
    at TEXT NOT NULL,
    revision INTEGER NOT NULL,
    PRIMARY KEY (item, annotator, criterion)
) WITHOUT ROWID;
"""


class Campaign:
    """The file of a campaign."""

    def __init__(self, path: Path) -> None:
        """Open a campaign.

        Raises:
            UserError: the file does not exist, or is not a readable campaign.
        """
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such study; start one with `rlhf-exp annotate RUN`")
        try:
            with reading(path) as db:
                mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                version = db.execute("PRAGMA user_version").fetchone()[0]
                row = db.execute("SELECT content FROM about").fetchone()
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: not a readable study: {error}") from error
        if mode != "wal":
            raise UserError(
                f"{path}: SQLite cannot keep a write-ahead log there (mode {mode}); put the study "
                "on a local disk with --study PATH"
            )
        if version != FORMAT:
            raise UserError(f"{path}: format {version}, expected {FORMAT}; use the version it has")
        values = json.loads(row[0])
        self.info = CampaignInfo(**values | {"criteria": tuple(values["criteria"])})

    @classmethod
    def create(cls, path: Path, info: CampaignInfo, items: Sequence[Item]) -> Campaign:
        """Create a campaign: whole, or not at all.

        Raises:
            UserError: the file exists already, or there is nothing to judge.
        """
        if not items:
            raise UserError(f"{info.source}: no two different answers to judge")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(sqlite3.connect(draft)) as db:
                db.executescript(SCHEMA)
                db.execute("INSERT INTO about VALUES (?)", (json.dumps(asdict(info)),))
                rows = [(item.id, item.prompt, item.answer_a, item.answer_b) for item in items]
                db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
                db.commit()
            os.link(draft, path)  # unlike a rename, fails if the file exists
        except FileExistsError as error:
            raise UserError(f"{path}: there is a study already; name another one") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls(path)

    @cached_property
    def items(self) -> list[Item]:
        """The items to judge, in a fixed order."""
        with reading(self.path) as db:
            rows = db.execute("SELECT prompt, answer_a, answer_b FROM items ORDER BY id")
            return [Item(*row) for row in rows]

    @cached_property
    def _ids(self) -> set[str]:
        return {item.id for item in self.items}

    def annotators(self) -> list[Annotator]:
        """Return the people with a link, by name."""
        with reading(self.path) as db:
            rows = db.execute("SELECT name, token FROM annotators ORDER BY name")
            return [Annotator(*row) for row in rows]

    def invite(self, names: Sequence[str]) -> None:
        """Give each name a link, unless it has one."""
        with writing(self.path) as db:
            for name in names:
                token = secrets.token_urlsafe(_TOKEN_BYTES)
                db.execute("INSERT OR IGNORE INTO annotators VALUES (?, ?)", (name, token))

    def votes(self, annotator: str | None = None) -> list[Vote]:
        """Return all votes, or those of one annotator, in a fixed order."""
        where = "" if annotator is None else "WHERE annotator = ?"
        query = f"SELECT {_VOTE_COLUMNS} FROM votes {where} ORDER BY item, annotator, criterion"
        with reading(self.path) as db:
            return [
                _vote_of_row(row) for row in db.execute(query, [annotator] if annotator else [])
            ]

    def record(self, vote: Vote) -> Vote:
        """Store an answer; when this returns, it is on the disk.

        Args:
            vote: the answer; its `revision` is the one shown on the page, 0 for none.

        Returns:
            The vote as stored. The same answer sent again changes nothing.

        Raises:
            Conflict: another answer has been stored since the page was shown.
        """
        with writing(self.path) as db:
            stored = _stored_vote(db, vote)
            if stored is not None and stored.choice is vote.choice:
                return stored
            if stored is not None and stored.revision != vote.revision:
                raise Conflict(stored)
            new = Vote(**asdict(vote) | {"revision": vote.revision + 1})
            _store_vote(db, new)
        return new

    def check_vote(self, vote: Vote) -> Vote:
        """Return a vote that was given elsewhere, after checking that it belongs to this campaign.

        Raises:
            ValueError: the campaign lacks its item or criterion, or the name is unusable.
        """
        if vote.item not in self._ids:
            raise ValueError(f"item {vote.item!r} is not in {self.path.name}")
        if vote.criterion not in self.info.criteria:
            known = ", ".join(self.info.criteria)
            raise ValueError(f"criterion {vote.criterion!r}; the study has {known}")
        if not vote.annotator.strip() or len(vote.annotator) > NAME_LENGTH:
            raise ValueError(f"annotator {vote.annotator[:NAME_LENGTH]!r} is no usable name")
        return vote

    def add(self, votes: Sequence[Vote]) -> int:
        """Store votes given elsewhere, all or none; return how many are new.

        Raises:
            UserError: one differs from the vote already stored.
        """
        self.invite(sorted({vote.annotator for vote in votes}))
        new = 0
        with writing(self.path) as db:
            for vote in votes:
                stored = _stored_vote(db, vote)
                if stored is not None and stored.sign != vote.sign:
                    raise UserError(
                        f"{self.path}: {vote.annotator}'s vote on item {vote.item} "
                        f"({vote.criterion}) is {stored.winner}, and {vote.winner} in the import; "
                        "nothing was imported: use another study (--study)"
                    )
                if stored is None:
                    _store_vote(db, vote)
                    new += 1
        return new


def _stored_vote(db: sqlite3.Connection, vote: Vote) -> Vote | None:
    key = (vote.item, vote.annotator, vote.criterion)
    query = f"SELECT {_VOTE_COLUMNS} FROM votes WHERE item = ? AND annotator = ? AND criterion = ?"
    row = db.execute(query, key).fetchone()
    return None if row is None else _vote_of_row(row)


def _store_vote(db: sqlite3.Connection, vote: Vote) -> None:
    values = asdict(vote) | {"choice": vote.choice.value}
    marks = ", ".join(f":{name}" for name in _VOTE_COLUMNS.split(", "))
    db.execute(f"INSERT OR REPLACE INTO votes ({_VOTE_COLUMNS}) VALUES ({marks})", values)


def _vote_of_row(row: tuple[object, ...]) -> Vote:
    values = dict(zip(_VOTE_COLUMNS.split(", "), row, strict=True))
    return Vote(**values | {"choice": Choice(values["choice"])})  # type: ignore[arg-type]


def now() -> str:
    """Return the time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection outside of any transaction."""
    with closing(sqlite3.connect(path, BUSY_S, isolation_level=None)) as db:
        # Write-ahead log, flushed at every commit: a committed vote survives a power cut.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        yield db


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that holds the write lock; all is stored at the end, or nothing."""
    with reading(path) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")


@dataclass(frozen=True)
class CampaignInfo:
    """The design of a campaign, fixed when it is created.

    Attributes:
        source: origin of the answers, such as an artifact's key.
        name_a: the baseline.
        name_b: the other model; in a collection the same one.
        collect: whether the votes are preferences to train on, with both answers from one model.
        criteria: the questions about each item, in order.
        instructions: text shown to annotators.
        seed: seed of sides and order.
        identical: number of prompts left out because both answers are the same; they count as ties.
        secret: key of the forms' tokens and of the pairs' names for other services.
        owner: token of the owner's page.
    """

    source: str
    name_a: str
    name_b: str
    collect: bool
    criteria: tuple[str, ...]
    instructions: str
    seed: int = 0
    identical: int = 0
    secret: str = field(default_factory=lambda: secrets.token_hex(32))
    owner: str = field(default_factory=lambda: secrets.token_urlsafe(_TOKEN_BYTES))


@dataclass(frozen=True)
class Annotator:
    """A person with a personal link."""

    name: str
    token: str


class Conflict(Exception):
    """The answer has been changed elsewhere since the page was shown.

    Attributes:
        stored: the vote as it is now.
    """

    def __init__(self, stored: Vote) -> None:
        super().__init__(f"revision {stored.revision} is stored")
        self.stored = stored


class Choice(StrEnum):
    """An annotator's choice; A is the answer shown first (left, or above)."""

    A = "A"
    tie = "Tie"
    B = "B"


@dataclass(frozen=True)
class Vote:
    """One annotator's answer to one question about one item.

    Attributes:
        item: the item's id.
        annotator: the annotator's name.
        criterion: the question.
        side: 0 if model a's answer was shown as A, 1 if as B.
        choice: the choice on the screen.
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
    """Return the choice on the screen; undoes `Vote.winner`.

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


@dataclass(frozen=True)
class Item:
    """One prompt and the answers of models a and b.

    Attributes:
        prompt: text; a dialogue with HH's markers, or anything else.
        answer_a: the baseline's answer.
        answer_b: the other model's answer.
    """

    prompt: str
    answer_a: str
    answer_b: str

    @cached_property
    def id(self) -> str:
        """The first 24 hexadecimal digits of the sha256 of the three texts."""
        content = json.dumps([self.prompt, self.answer_a, self.answer_b])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @property
    def identical(self) -> bool:
        """Whether both answers are the same to a reader."""
        return self.answer_a.strip() == self.answer_b.strip()


def item_of(prompt: str, answer_a: str, answer_b: str) -> Item:
    """Return an item; halves of surrogate pairs, which no database stores, are replaced."""
    return Item(*(_storable(text) for text in (prompt, answer_a, answer_b)))


def items_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the items of rows that hold `prompt`, `answer_a` and `answer_b`; each item once."""
    items = (item_of(*(str(row[name]) for name in TEXTS)) for row in rows)
    return list({item.id: item for item in items}.values())


def read_pairs(path: Path) -> list[Item]:
    """Read items from JSON lines.

    Raises:
        UserError: the file is missing, or a line is no JSON object with three texts.
    """
    rows = []
    for origin, record in read_jsonl(path, "annotate"):
        if isinstance(record, UnreadableLine):
            raise UserError(f"{origin}: {record.reason}")
        fields = record if isinstance(record, Mapping) else {}
        wrong = [name for name in TEXTS if not isinstance(fields.get(name), str)]
        if wrong:
            raise UserError(
                f"{origin}: expected a JSON object with the texts {', '.join(TEXTS)}; "
                f"{' and '.join(wrong)} is missing or no text"
            )
        rows.append(fields)
    if not rows:
        raise UserError(f"{path}: no rows; expected one pair of answers a line")
    return items_of_rows(rows)


def sample_items(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """Return `count` items by a seeded order; a smaller number is part of a larger one."""
    ordered = sorted(items, key=lambda item: _seeded_hash(seed, "choose", item.id))
    return ordered if count is None else ordered[:count]


def display_order(items: Sequence[Item], seed: int, annotator: str) -> list[Item]:
    """Return the items in the order in which an annotator sees them."""
    return sorted(items, key=lambda item: _seeded_hash(seed, "order", item.id, annotator))


def display_side(seed: int, item: str, annotator: str) -> int:
    """Return 0 if the annotator sees model a's answer as A, 1 if as B."""
    return _seeded_hash(seed, "side", item, annotator) & 1


def _seeded_hash(seed: int, *parts: str) -> int:
    content = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _storable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def question(criterion: str) -> str:
    """Return a criterion's question: `overall` is special, other criteria are adjectives."""
    if criterion == "overall":
        return "Which answer is better overall?"
    return f"Which answer is more {criterion.replace('_', ' ')}?"


def check_criteria(names: list[str]) -> tuple[str, ...]:
    """Return the criteria.

    Raises:
        UserError: there is none, one occurs twice, or one cannot name a form's field.
    """
    for name in names:
        if not CRITERION.fullmatch(name):
            raise UserError(
                f"--criteria: {name!r} is no criterion; expected words of small letters, digits, "
                "'_' and '-', such as overall,helpful,harmless"
            )
    if not names or len(set(names)) < len(names):
        raise UserError(f"--criteria: {','.join(names)!r} names none, or one of them twice")
    return tuple(names)
