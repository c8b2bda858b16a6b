"""Tokenized sets, kept on disk by content.

The key is made of the rows' content, of the codec and of the lengths, so that a changed row,
tokenizer or limit finds nothing and an unchanged one is read back memory-mapped. Every response
ends with the end-of-sequence token, unless it had to be cut.

Rows of different lengths in flat arrays, and a folder that keeps them by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, rows_digest
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError

_FORMAT = 1  # to be raised when the same rows would be tokenized differently


@dataclass(frozen=True)
class TokenizedDemonstrations:
    """Prompts and responses to imitate; `cut` prompts and `cut_responses` responses were cut."""

    prompt_ids: RaggedArray
    response_ids: RaggedArray
    cut: int
    cut_responses: int

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class TokenizedPreferences:
    """Prompts with both responses; `cut` prompts and `cut_responses` responses were cut."""

    prompt: RaggedArray
    chosen: RaggedArray
    rejected: RaggedArray
    cut: int
    cut_responses: int

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts with the data set's own responses.

    Attributes:
        prompt: the prompts.
        original: the data set's responses; a row of no tokens where there is none.
        cut: number of prompts cut.
        cut_responses: number of original responses cut.
    """

    prompt: RaggedArray
    original: RaggedArray
    cut: int
    cut_responses: int

    def __len__(self) -> int:
        return len(self.prompt)


def tokenize_demonstrations(
    rows: Sequence[Demonstration], codec: Codec, seq_length: int, cache: Path | None = None
) -> TokenizedDemonstrations:
    """Tokenize demonstrations to at most `seq_length` tokens each, prompt and response together.

    Prompts are cut from the left to leave the response whole; a response that alone is too long is
    cut from the right. `cache` is the folder of cached sets (`None`: no cache).
    """
    _check_length(seq_length)

    def build() -> RaggedColumns:
        columns = _Columns(codec, "prompt_ids", "response_ids")
        prompts = codec.encode_prompts([row.history for row in rows])
        responses = codec.encode_responses([row.response for row in rows])
        for prompt, response in zip(prompts, responses, strict=True):
            (cut,) = columns.ended(seq_length - 1, response)
            columns.add(prompt_ids=columns.left(prompt, seq_length - len(cut)), response_ids=cut)
        return columns.finish()

    return TokenizedDemonstrations(
        **_tokenized(cache, "demonstrations", rows, codec, [seq_length], build)
    )


def tokenize_preferences(
    rows: Sequence[Preference], codec: Codec, seq_length: int, cache: Path | None = None
) -> TokenizedPreferences:
    """Tokenize pairs to at most `seq_length` tokens each side; both keep the same prompt."""
    _check_length(seq_length)

    def build() -> RaggedColumns:
        columns = _Columns(codec, "prompt", "chosen", "rejected")
        prompts = codec.encode_prompts([row.history for row in rows])
        chosen = codec.encode_responses([row.chosen for row in rows])
        rejected = codec.encode_responses([row.rejected for row in rows])
        for prompt, *sides in zip(prompts, chosen, rejected, strict=True):
            good, bad = columns.ended(seq_length - 1, *sides)
            room = seq_length - max(len(good), len(bad))
            columns.add(prompt=columns.left(prompt, room), chosen=good, rejected=bad)
        return columns.finish()

    return TokenizedPreferences(
        **_tokenized(cache, "preferences", rows, codec, [seq_length], build)
    )


def tokenize_prompts(
    rows: Sequence[Prompt],
    codec: Codec,
    seq_length: int,
    max_new_tokens: int,
    cache: Path | None = None,
) -> TokenizedPrompts:
    """Tokenize prompts so that `max_new_tokens` more tokens fit into `seq_length`.

    Prompts are cut from the left to `seq_length - max_new_tokens` tokens, original responses from
    the right to `max_new_tokens`.

    Raises:
        UserError: nothing would remain of a prompt.
    """
    room = _room(seq_length, max_new_tokens)

    def build() -> RaggedColumns:
        columns = _Columns(codec, "prompt", "original")
        prompts = codec.encode_prompts([row.history for row in rows])
        originals = codec.encode_responses([row.original or "" for row in rows])
        for row, prompt, original in zip(rows, prompts, originals, strict=True):
            kept = [] if row.original is None else columns.ended(max_new_tokens, original)[0]
            columns.add(prompt=columns.left(prompt, room), original=kept)
        return columns.finish()

    lengths = [seq_length, max_new_tokens]
    return TokenizedPrompts(**_tokenized(cache, "prompts", rows, codec, lengths, build))


def tokenize_texts(
    texts: Sequence[str], codec: Codec, seq_length: int, max_new_tokens: int
) -> TokenizedPrompts:
    """Tokenize texts to be continued as they are, cut from the left as prompts are.

    Raises:
        UserError: nothing would remain of a text.
    """
    room = _room(seq_length, max_new_tokens)
    columns = _Columns(codec, "prompt", "original")
    for ids in codec.encode_texts(texts):
        columns.add(prompt=columns.left(ids, room), original=[])
    found = columns.finish()
    fields: dict[str, Any] = {**found.columns, **found.counts}
    return TokenizedPrompts(**fields)


def _room(seq_length: int, max_new_tokens: int) -> int:
    """Return the tokens that `max_new_tokens` leave for a prompt, at least 1."""
    room = seq_length - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} and seq_length {seq_length}: that leaves {room} "
            "tokens for a prompt; both must be at least 1. Lower max_new_tokens or raise seq_length"
        )
    return room


class _Columns:
    """Rows under construction: cuts them to length and counts what was cut."""

    def __init__(self, codec: Codec, *names: str) -> None:
        self._eos, self._bos = codec.eos_id, codec.bos_id
        self._rows: dict[str, list[list[int]]] = {name: [] for name in names}
        self._counts = {"cut": 0, "cut_responses": 0}

    def ended(self, room: int, *responses: list[int]) -> list[list[int]]:
        """Return the responses with the end-of-sequence token, cut on the right to `room`."""
        self._counts["cut_responses"] += sum(len(ids) + 1 > room for ids in responses)
        return [[*ids, self._eos][:room] for ids in responses]

    def left(self, ids: list[int], room: int) -> list[int]:
        """Return `ids` cut on the left to `room`; a beginning-of-sequence token stays in front."""
        if len(ids) <= room:
            return ids
        self._counts["cut"] += 1
        if room > 1 and ids[0] == self._bos:
            return [ids[0], *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]

    def add(self, **row: list[int]) -> None:
        for name, ids in row.items():
            self._rows[name].append(ids)

    def finish(self) -> RaggedColumns:
        columns = {name: RaggedArray.of(rows) for name, rows in self._rows.items()}
        return RaggedColumns(columns, self._counts)


def _check_length(seq_length: int) -> None:
    if seq_length < 2:
        raise UserError(
            f"seq_length is {seq_length}; a prompt and a response need at least 2 tokens together"
        )


def _tokenized(
    cache: Path | None,
    kind: str,
    rows: Sequence[Row],
    codec: Codec,
    lengths: list[int],
    build: Callable[[], RaggedColumns],
) -> dict[str, Any]:
    """Return the fields of a tokenized set, from the cache where it is there."""
    key: list[str | int] = [_FORMAT, kind, rows_digest(rows), codec.digest, *lengths]
    found = build() if cache is None else load_or_build(cache, key, build)
    return {**found.columns, **found.counts}


@dataclass(frozen=True)
class RaggedArray:
    """Rows of different lengths, laid end to end.

    Attributes:
        flat: [all tokens] int32.
        offsets: [rows + 1] int64, where each row begins, and the end.
    """

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> RaggedArray:
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
class RaggedColumns:
    """Columns of equally many rows, and counts worth reporting."""

    columns: dict[str, RaggedArray]
    counts: dict[str, int]


def load_or_build(
    folder: Path, key: list[str | int], build: Callable[[], RaggedColumns]
) -> RaggedColumns:
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


def _read(place: Path) -> RaggedColumns | None:
    """Return the set at `place`, its arrays memory-mapped, or `None` where it is not whole."""
    try:
        counts = json.loads((place / "counts.json").read_text())
        columns = {
            path.name.removesuffix(".offsets.npy"): RaggedArray(
                _load(path.with_name(path.name.replace(".offsets.", ".flat."))), _load(path)
            )
            for path in sorted(place.glob("*.offsets.npy"))
        }
    except (OSError, ValueError):
        return None
    whole = columns and all(len(c.flat) == c.offsets[-1] for c in columns.values())
    return RaggedColumns(columns, counts) if whole else None


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write(place: Path, content: RaggedColumns) -> None:
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
