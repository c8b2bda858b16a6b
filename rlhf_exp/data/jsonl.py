"""JSON lines, plain or gzipped, with the number of every line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.errors import UserError


@dataclass(frozen=True)
class Unreadable:
    """Stands for a line that is not JSON."""

    reason: str


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", record) for every line that is not blank; lines count from 1.

    Args:
        path: a `.jsonl` file, or `.gz` of one.
        key: the config key that named the file, for errors.

    Raises:
        UserError: the file is missing, or broken as a whole.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"{key}: no such file: {path} (found {found}); give a .jsonl or .jsonl.gz")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _record(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path} cannot be read after line {number}: {error}") from error


def _record(line: bytes) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8: byte {error.start} of the line")
