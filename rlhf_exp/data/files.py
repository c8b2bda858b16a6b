"""Data files that people bring: JSON lines, a JSON array, CSV, Parquet, a saved data set.

Each yields its records with the place where they stand, so that a bad one can be named. A file's
content tells what it is, except that CSV goes by its name. A record that cannot be read is an
`UnreadableLine`; a file that cannot be read on is an error.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from rlhf_exp.data.jsonl import (
    MAX_LINE_BYTES,
    UnreadableLine,
    opened,
    parse_json,
    read_jsonl,
)
from rlhf_exp.errors import UserError

Records = Iterator[tuple[str, object]]
KINDS = ".jsonl, .json (an array), .csv, .tsv, .parquet, or a folder that `datasets` has saved"
_PARQUET = b"PAR1"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SAVED_SPLITS, _SAVED_SET = "dataset_dict.json", "state.json"


def read_records(path: Path, key: str) -> Records:
    """Yield ("file:line", record) of every record; of Parquet and saved sets "file:row", from 1.

    Args:
        path: a file, gzipped or not (JSON and CSV), or a folder of `save_to_disk`.
        key: the config key that names it, for errors.

    Raises:
        UserError: it is missing, is something else, or cannot be read to its end.
    """
    return _reader_of(path)[1](path, key)


def kind_of(path: Path) -> str:
    """Return what a file is, in words."""
    return _reader_of(path)[0]


def is_saved(path: Path) -> bool:
    """Return whether a folder holds what `datasets` has saved."""
    return any((path / name).is_file() for name in (_SAVED_SPLITS, _SAVED_SET))


def has_splits(path: Path) -> bool:
    """Return whether a folder holds several splits that `datasets` has saved."""
    return (path / _SAVED_SPLITS).is_file()


def saved_splits(path: Path) -> dict[str, Any]:
    """Return the splits of what `datasets` has saved in a folder; one set is the split `train`."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _reader_of(path: Path) -> tuple[str, Callable[[Path, str], Records]]:
    if path.is_dir() and is_saved(path):
        return "a saved data set", _saved
    if not path.is_file():
        return "nothing", read_jsonl  # which says what is wrong
    with path.open("rb") as file:
        start = file.read(4)
    if start == _PARQUET:
        return "Parquet", _parquet
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _DELIMITERS:
        return suffix[1:].upper(), _table
    # Lines of lists are no array.
    if suffix != ".jsonl" and _first_character(path) == b"[":
        return "a JSON array", _array
    return "JSON lines", read_jsonl


def _first_character(path: Path) -> bytes:
    try:
        with opened(path, "data") as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except (OSError, EOFError, UserError):
        return b""  # whoever reads it says what is wrong


def _array(path: Path, key: str) -> Records:
    """Yield the items of a JSON array, each with the line that it begins in."""
    text = _text_of(path, key)
    decoder, line, place = json.JSONDecoder(), 1, text.index("[") + 1
    counted = 0
    while True:
        place = _skip(text, place, " \t\r\n")
        if text[place : place + 1] == "]":
            if rest := text[place + 1 :].strip():
                raise UserError(f"{key}: {path}: something stands after the array: {rest[:40]!r}")
            return
        line, counted = line + text.count("\n", counted, place), place
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{key}: {path}:{line}: the array cannot be read on: "
                f"{getattr(error, 'msg', None) or type(error).__name__}; is the file complete?"
            ) from error
        try:
            record = parse_json(text[place:end])
        except ValueError as error:
            record = UnreadableLine(str(error))
        yield f"{path}:{line}", record
        place = _skip(text, end, " \t\r\n")
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise UserError(
                f"{key}: {path}:{line}: expected `,` or `]` in the array, found "
                f"{text[place : place + 20]!r}; is the file complete?"
            )


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _text_of(path: Path, key: str) -> str:
    with opened(path, key) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{key}: {path}:{line}: not UTF-8: byte {error.start} of the file"
        ) from error


def _table(path: Path, key: str) -> Records:
    """Yield the rows of a CSV file: text by the names of the first row."""
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = _DELIMITERS[[s.lower() for s in path.suffixes if s.lower() != ".gz"][-1]]
    with opened(path, key) as binary:
        file = io.TextIOWrapper(cast(io.BytesIO, binary), "utf-8-sig", newline="")
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            names = next(rows, [])
            _check_names(names, path, key)
            while True:
                line = rows.line_num + 1
                cells = next(rows, None)
                if cells is None:
                    return
                if len(cells) == len(names):
                    yield f"{path}:{line}", dict(zip(names, cells, strict=True))
                elif cells:
                    reason = f"{len(cells)} cells, the first row names {len(names)} columns"
                    yield f"{path}:{line}", UnreadableLine(reason)
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: {path}: not UTF-8, after line {rows.line_num}") from error
        except csv.Error as error:
            raise UserError(
                f"{key}: {path}:{line}: the row that begins here cannot be read: {error}; is a "
                'quote (") closed that opens a cell, and doubled where it stands inside of one?'
            ) from error


def _check_names(names: list[str], path: Path, key: str) -> None:
    if not names or not all(name.strip() for name in names):
        raise UserError(f"{key}: {path}:1: the first row does not name every column: {names}")
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise UserError(f"{key}: {path}:1: two columns have the name {twice[0]!r}")


def _parquet(path: Path, key: str) -> Records:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", record
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {path} cannot be read after row {row}: {reason}") from error


def _saved(path: Path, key: str) -> Records:
    try:
        splits = saved_splits(path)
    except Exception as error:  # `datasets` raises some twenty unrelated classes
        raise UserError(
            f"{key}: {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if has_splits(path):
        raise UserError(
            f"{key}: {path} has the splits {', '.join(splits)}; name one, such as "
            f"{path / next(iter(splits), 'train')}, or read them all with data.source=hub "
            f"data.path={path}"
        )
    yield from ((f"{path}:{row}", record) for row, record in enumerate(splits["train"], 1))
