"""Fingerprints: the key of a stage's content, the digest of a file or folder.

A key is what decides whether an artifact can be reused, so it takes only values whose meaning does
not depend on the machine: a path is refused, its content's digest stands in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.sealed import (
    SETTLED_S,
    Damaged,
    file_digest,
    seal_values,
    sealed_values,
    stamp_of,
)

log = logging.getLogger(__name__)

KEY_LENGTH = 16


def key_of(content: Mapping[str, Any]) -> str:
    """Return the key of `content`: the first 16 hex characters of the sha256 of its canonical JSON.

    The order of a mapping does not count, that of a list does; a tuple equals a list, a dataclass
    the mapping of its fields, an enum member its name. `1`, `1.0` and `True` are different.

    Raises:
        TypeError: a value that has no canonical form (a path, a set, bytes, a tensor); the message
            names its place.
    """
    text = json.dumps(_canonical(content, ""), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _canonical(value: Any, place: str) -> Any:  # noqa: ANN401
    # Enum before str and int: members of StrEnum and IntEnum are both.
    if isinstance(value, Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str:
                raise TypeError(f"{place or 'key'}: name {name!r} in a mapping is not a string")
        return {
            name: _canonical(item, f"{place}.{name}".lstrip(".")) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{place}[{number}]") for number, item in enumerate(value)]
    hint = "; take the digest of its content instead" if isinstance(value, PurePath) else ""
    raise TypeError(f"{place or 'key'}: {type(value).__name__} {value!r} cannot be in a key{hint}")


def folder_digest(path: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Return the sha256 over names and contents of the files below `path` (see `DigestCache`)."""
    return _folder_digest(Path(path), patterns, file_digest)


def _folder_digest(folder: Path, patterns: Iterable[str], digest: Any) -> str:  # noqa: ANN401
    wanted = tuple(patterns)
    total = hashlib.sha256()
    # Links are followed: a hub snapshot is a folder of links to blobs.
    for name in sorted(_names_below(folder)):
        if any(fnmatch(name, pattern) for pattern in wanted):
            total.update(f"{name}\0{digest(folder / name)}\n".encode())
    return total.hexdigest()


def _names_below(folder: Path) -> Iterable[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


class DigestCache:
    """Digests of files, remembered by path, size, times and inode, so that 12 GB are read once.

    Several processes may share one cache file: a lost update only costs reading a file again.
    """

    def __init__(self, path: Path) -> None:
        """Use the JSON file `path`; it is created when there is something to remember."""
        self.path = Path(path)

    def file(self, path: Path) -> str:
        """Return the sha256 of a file, from the cache if the file has not changed since."""
        return self._files([Path(path)])[0]

    def folder(self, path: Path, patterns: Iterable[str] = ("*",)) -> str:
        """Return the sha256 over relative names and contents of a folder's files.

        Args:
            path: the folder; files and folders whose name starts with a dot are left out, links
                are followed.
            patterns: shell patterns on the relative name with slashes (`*` crosses slashes); a file
                counts if one fits.
        """
        root = Path(path)
        known = self._read()
        fresh: dict[str, list[Any]] = {}
        digest = _folder_digest(root, patterns, lambda file: self._one(file, known, fresh))
        self._add(fresh)
        return digest

    def _files(self, paths: list[Path]) -> list[str]:
        known = self._read()
        fresh: dict[str, list[Any]] = {}
        digests = [self._one(path, known, fresh) for path in paths]
        self._add(fresh)
        return digests

    def _one(self, path: Path, known: dict[str, list[Any]], fresh: dict[str, list[Any]]) -> str:
        name = str(path.absolute())
        stamp = [*stamp_of(path)]
        if known.get(name, [])[:-1] == stamp:
            return str(known[name][-1])
        digest = file_digest(path)
        settled = time.time() - path.stat().st_mtime > SETTLED_S
        if settled and stamp == [*stamp_of(path)]:
            fresh[name] = [*stamp, digest]
        return digest

    def _read(self) -> dict[str, list[Any]]:
        try:
            return {
                name: note
                for name, note in sealed_values(self.path).items()
                if isinstance(note, list)
            }
        except FileNotFoundError:
            return {}
        except Damaged as error:
            log.warning("%s; its digests are computed again", error)
            return {}

    def _add(self, fresh: dict[str, list[Any]]) -> None:
        if not fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.path, seal_values(self._read() | fresh), durable=False)
        except OSError as error:
            # Only time is lost: on a read-only file system, for example, a plan works as well.
            log.info("%s: digests are not remembered (%s)", self.path, error)
