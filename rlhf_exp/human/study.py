"""A study: what is judged, by whom, and every vote, in one SQLite file.

A vote is on the disk before `record` returns. The file holds the annotators' tokens and which side
is whose, so only its owner may read it.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.human.database import FORMAT, SCHEMA, reading, writing
from rlhf_exp.human.items import Item
from rlhf_exp.human.votes import Choice, Vote

NAME_LENGTH = 100
STUDIES = "human"
"""Folder of studies in the output folder."""
_TOKEN_BYTES = 24
_VOTE = "item, annotator, criterion, side, choice, seconds, at, revision"


@dataclass(frozen=True)
class About:
    """What a study is, fixed when it is made.

    Attributes:
        source: what the answers come from, such as an artifact's key.
        name_a: the baseline.
        name_b: the other model; of a collection the same one.
        collect: whether preferences are gathered to train on, with both answers from one model.
        criteria: what is asked about each item, in order.
        instructions: shown to annotators.
        seed: of sides and order.
        identical: prompts left out because both answers are the same; they count as ties.
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
    """A person with a link of her own."""

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


class Study:
    """One study's file."""

    def __init__(self, path: Path) -> None:
        """Open a study.

        Raises:
            UserError: there is none, or it cannot be used as one.
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
        self.about = About(**values | {"criteria": tuple(values["criteria"])})

    @classmethod
    def create(cls, path: Path, about: About, items: Sequence[Item]) -> Study:
        """Make a study: whole, or not at all.

        Raises:
            UserError: there is one already, or there is nothing to judge.
        """
        if not items:
            raise UserError(f"{about.source}: no two different answers to judge")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(sqlite3.connect(draft)) as db:
                db.executescript(SCHEMA)
                db.execute("INSERT INTO about VALUES (?)", (json.dumps(asdict(about)),))
                rows = [(item.id, item.prompt, item.answer_a, item.answer_b) for item in items]
                db.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
                db.commit()
            os.link(draft, path)  # unlike a rename, fails where a study exists
        except FileExistsError as error:
            raise UserError(f"{path}: there is a study already; name another one") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls(path)

    @cached_property
    def items(self) -> list[Item]:
        """What is judged, in a fixed order."""
        with reading(self.path) as db:
            rows = db.execute("SELECT prompt, answer_a, answer_b FROM items ORDER BY id")
            return [Item(*row) for row in rows]

    @cached_property
    def _ids(self) -> set[str]:
        return {item.id for item in self.items}

    def annotators(self) -> list[Annotator]:
        """Return who has a link, by name."""
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
        query = f"SELECT {_VOTE} FROM votes {where} ORDER BY item, annotator, criterion"
        with reading(self.path) as db:
            return [_vote(row) for row in db.execute(query, [annotator] if annotator else [])]

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
            stored = _stored(db, vote)
            if stored is not None and stored.choice is vote.choice:
                return stored
            if stored is not None and stored.revision != vote.revision:
                raise Conflict(stored)
            new = Vote(**asdict(vote) | {"revision": vote.revision + 1})
            _put(db, new)
        return new

    def checked(self, vote: Vote) -> Vote:
        """Return a vote that comes from elsewhere, if it can be one of this study.

        Raises:
            ValueError: it is about an item or a criterion that the study lacks, or by nobody.
        """
        if vote.item not in self._ids:
            raise ValueError(f"item {vote.item!r} is not in {self.path.name}")
        if vote.criterion not in self.about.criteria:
            known = ", ".join(self.about.criteria)
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
                stored = _stored(db, vote)
                if stored is not None and stored.sign != vote.sign:
                    raise UserError(
                        f"{self.path}: {vote.annotator}'s vote on item {vote.item} "
                        f"({vote.criterion}) is {stored.winner}, and {vote.winner} in the import; "
                        "nothing was imported: use another study (--study)"
                    )
                if stored is None:
                    _put(db, vote)
                    new += 1
        return new


def _stored(db: sqlite3.Connection, vote: Vote) -> Vote | None:
    key = (vote.item, vote.annotator, vote.criterion)
    query = f"SELECT {_VOTE} FROM votes WHERE item = ? AND annotator = ? AND criterion = ?"
    row = db.execute(query, key).fetchone()
    return None if row is None else _vote(row)


def _put(db: sqlite3.Connection, vote: Vote) -> None:
    values = asdict(vote) | {"choice": vote.choice.value}
    marks = ", ".join(f":{name}" for name in _VOTE.split(", "))
    db.execute(f"INSERT OR REPLACE INTO votes ({_VOTE}) VALUES ({marks})", values)


def _vote(row: tuple[object, ...]) -> Vote:
    values = dict(zip(_VOTE.split(", "), row, strict=True))
    return Vote(**values | {"choice": Choice(values["choice"])})  # type: ignore[arg-type]


def now() -> str:
    """Return the time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
