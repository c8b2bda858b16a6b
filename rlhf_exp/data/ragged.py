"""Rows of different lengths in flat arrays, and a folder that keeps them by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_exp.errors import UserError


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, laid end to end.

    Attributes:
        flat: [all tokens] int32.
        offsets: [rows + 1] int64, where each row begins, and the end.
    """

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Lay `rows` end to end."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.fromiter((token for row in rows for token in row), np.int32, int(offsets[-1]))
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return row number `row`: [its length] int32."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Return the rows' lengths: [rows] int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RaggedSet:
    """Columns of equally many rows, and counts worth reporting."""

    columns: dict[str, Ragged]
    counts: dict[str, int]


def cached(folder: Path, key: list[str | int], build: Callable[[], RaggedSet]) -> RaggedSet:
    """Return the set kept in `folder` under `key`, building it where it is missing or broken.

    What is written appears under its name whole or not at all, so that processes may share a folder
    without a lock: two that build the same set write the same bytes, and the first one stays.

    Raises:
        UserError: the folder cannot be written.
    """
    place = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    found = _read(place)
    if found is not None:
        return found
    built = build()
    try:
        _write(place, built)
    except OSError as error:
        raise UserError(
            f"cannot keep tokenized data in {folder}: {error}; free some space or name another "
            "folder"
        ) from error
    return _read(place) or built


def _read(place: Path) -> RaggedSet | None:
    """Return the set at `place`, its arrays memory-mapped, or `None` where it is not whole."""
    try:
        counts = json.loads((place / "counts.json").read_text())
        columns = {
            path.name.removesuffix(".offsets.npy"): Ragged(
                _load(path.with_name(path.name.replace(".offsets.", ".flat."))), _load(path)
            )
            for path in sorted(place.glob("*.offsets.npy"))
        }
    except (OSError, ValueError):
        return None
    whole = columns and all(len(c.flat) == c.offsets[-1] for c in columns.values())
    return RaggedSet(columns, counts) if whole else None


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write(place: Path, content: RaggedSet) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=place.parent))
    try:
        for name, column in content.columns.items():
            np.save(staging / f"{name}.flat.npy", column.flat)
            np.save(staging / f"{name}.offsets.npy", column.offsets)
        (staging / "counts.json").write_text(json.dumps(content.counts))
        if place.exists() and _read(place) is None:
            shutil.rmtree(place, ignore_errors=True)
        os.chmod(staging, 0o755)  # mkdtemp's folders are private
        try:
            staging.rename(place)
        except OSError:
            if _read(place) is None:
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
