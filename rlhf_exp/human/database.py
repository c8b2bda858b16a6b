"""The SQLite file of a study: its tables and how it is opened.

Every use opens its own connection, so that threads and processes can share the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

FORMAT = 1
# How long a writer waits for another one, in seconds.
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


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection outside of any transaction."""
    with closing(sqlite3.connect(path, BUSY_S, isolation_level=None)) as db:
        # Write-ahead log, flushed at every commit: what is committed survives a power cut.
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
