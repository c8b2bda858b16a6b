"""JSON lines that people bring: bytes to records, each with its file and line.

One line never ends the reading of the others: what makes a line unreadable is its reason. A file
that is no text at all, or ends before its end, is an error.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_exp.errors import UserError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; a file without line ends must not fill the memory."""
MAX_DEPTH = 100
"""Deepest nesting of a value. Python's own limit depends on how deep the caller stands."""
_TOO_DEEP = f"brackets are nested more than {MAX_DEPTH} deep"
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True)
class UnreadableLine:
    """A line that is not valid JSON, and why."""

    reason: str


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", record) for every line that is not blank; lines count from 1.

    Args:
        path: a `.jsonl` file, or gzip of one, which is told by its first bytes.
        key: the config key that names the file, for errors.

    Raises:
        UserError: the file is missing, is something else, or cannot be read to its end.
    """
    number = 0
    try:
        with opened(path, key) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    reason = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"
                    yield f"{path}:{number}", UnreadableLine(reason)
                elif line.strip():
                    yield f"{path}:{number}", _record(line.rstrip())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{key}: {path} cannot be read after line {number}: {error}; is it complete?"
        ) from error


@contextmanager
def opened(path: Path, key: str) -> Iterator[BinaryIO]:
    """Open a file of text, unpacked if it is gzip.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"{key}: no such file: {path} (found {kind}); give a .jsonl or .jsonl.gz")
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        for magic, kind in _FOREIGN.items():
            if start.startswith(magic):
                raise UserError(
                    f"{key}: {path} is {kind}; give JSON lines in UTF-8, as .jsonl or .jsonl.gz"
                )
        if not start.startswith(_GZIP):
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc] # a file of bytes in all that is used here


def _record(line: bytes) -> object:
    try:
        # Halves of surrogate pairs that were encoded one by one are put together again.
        text = line.decode("utf-8-sig", "surrogatepass")
        if not line.isascii() and unpaired_surrogate(text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return parse_json(text)
    except UnicodeDecodeError as error:
        return UnreadableLine(f"not UTF-8: byte {error.start} of the line")
    except ValueError as error:
        return UnreadableLine(str(error))


def parse_json(text: str) -> object:
    """Return the value in a JSON text of unknown origin.

    Raises:
        ValueError: it is not JSON, nested too deeply, holds a number too long to be read, or an
            object in which a name stands for two values.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except _RepeatedNameError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise ValueError("a number has too many digits to be read") from error
    brackets = text.count("[") + text.count("{")
    if brackets > MAX_DEPTH and isinstance(value, dict | list) and _too_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


class _RepeatedNameError(ValueError):
    """An object in which a name stands for two values."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if fields[name] != value:
                raise _RepeatedNameError(f"the field {name[:40]!r} stands there with two values")
    return fields


def _too_deep(value: dict[str, object] | list[object]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def unpaired_surrogate(text: str) -> str | None:
    r"""Return the first half of a surrogate pair in `text`, as `\ud83d`; it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
