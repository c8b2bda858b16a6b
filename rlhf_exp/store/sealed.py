"""Content with its digest, so that a reader can tell damage (`Damaged`) from data.

A disk loses bits without a word, and a power cut leaves files empty that were not flushed. A file
that can be computed again is then made again; any other is named.

- `seal_file`: `NAME` with `NAME.sha256` beside it, as `sha256sum` prints it.
- `seal_folder`: files with `digests.json` among them.
- `seal_values`: JSON values with their digest, in one file.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_exp.store.atomic_files import atomic_file, sync, write_json_atomic, write_text_atomic

DIGESTS, DIGEST_SUFFIX = "digests.json", ".sha256"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Damaged(ValueError):
    """A file does not have the content that was written; the message names it."""


def file_digest(path: Path) -> str:
    """Return the sha256 (64 hex characters) of the file's content."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# A file changed twice within the clock's grain keeps its times: the digest of one that has just
# been written is not remembered.
SETTLED_S = 2.0


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return size, times of change and inode of a file: while they stay, so does its content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


_digests: dict[tuple[int, ...], str] = {}


def file_digest_once(path: Path) -> str:
    """Return the digest of a file, which is read once in this process while it stays unchanged.

    The digest is not kept for later processes: a bit that a disk loses changes no time.
    """
    stamp = (path.stat().st_dev, *stamp_of(path))
    if stamp in _digests:
        return _digests[stamp]
    digest = file_digest(path)
    if time.time() - path.stat().st_ctime > SETTLED_S and stamp[1:] == stamp_of(path):
        _digests[stamp] = digest
    return digest


def digest_path(path: Path) -> Path:
    """Return where the digest of a sealed file is."""
    return path.with_name(path.name + DIGEST_SUFFIX)


@contextmanager
def seal_file(path: Path) -> Iterator[Path]:
    """Write a file as `atomic_file` does, with its digest beside it."""
    with atomic_file(path) as draft:
        yield draft
        # First the digest: a file that is there has one.
        write_text_atomic(digest_path(path), f"{file_digest(draft)}  {path.name}\n")


def check_sealed_file(path: Path) -> None:
    """Return if a file is there as it was written.

    Raises:
        Damaged: its content does not match the digest beside it, or there is none.
        FileNotFoundError: it is not there.
    """
    content = file_digest(path)
    try:
        expected = digest_path(path).read_text(encoding="utf-8").partition(" ")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: its digest cannot be read ({error})") from error
    if content != expected:
        raise Damaged(f"{path}: {_size(path)}, which do not match the digest beside it")


def seal_folder(folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Flush a folder's files to disk and write down their digests.

    Args:
        folder: a folder of files.
        digests: those of its files that are flushed already, by name; by default none are.
    """
    if digests is None:
        files = [path for path in sorted(folder.iterdir()) if path.name != DIGESTS]
        for path in files:
            sync(path)
        digests = {path.name: file_digest(path) for path in files}
    write_json_atomic(folder / DIGESTS, digests)


def check_sealed_folder(folder: Path) -> Collection[str]:
    """Return the names of a folder's files if all are there as they were written.

    Raises:
        Damaged: names the file that is missing or does not match its digest.
        FileNotFoundError: the folder has no digests.
    """
    path = folder / DIGESTS
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"{path}: not JSON ({error})") from error
    if not isinstance(digests, dict) or not digests:
        raise Damaged(f"{path}: no digests by name")
    for name, expected in digests.items():
        file = folder / name
        if not isinstance(expected, str) or not _SHA256.fullmatch(expected):
            raise Damaged(f"{path}: no digest of {name}")
        if Path(name).name != name or not file.is_file():
            raise Damaged(f"{file}: missing")
        if file_digest(file) != expected:
            raise Damaged(f"{file}: {_size(file)}, which do not match its digest")
    return digests.keys()


def seal_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values together with their digest, for a small file."""
    return {"sha256": values_digest(content), "content": content}


def sealed_values(path: Path) -> dict[str, Any]:
    """Return the values in a JSON file that holds what `seal_values` returned.

    Raises:
        Damaged: it holds anything else.
        FileNotFoundError: it is not there.
    """
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = sealed["content"]
        if isinstance(content, dict) and values_digest(content) == sealed["sha256"]:
            return content
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: {type(error).__name__}: {error}") from error
    raise Damaged(f"{path}: does not match its digest")


def values_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes"
