"""Tokenized data sets: rows cut to length, in flat arrays, cached on disk by content.

Every response ends with the end-of-sequence token, unless it was cut. The cache's key is made of
the rows' content, the codec and the lengths: a changed row, tokenizer or limit builds a new entry,
an unchanged set is read back memory-mapped, a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, rows_digest
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import draft_of, sync
from rlhf_exp.store.sealed import DIGESTS, Damaged, check_sealed_folder, seal_folder

log = logging.getLogger(__name__)

# Raise it when the same rows would be tokenized differently.
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class RaggedArray:
    """Rows of different lengths, concatenated.

    Attributes:
        flat: [all tokens] int32.
        offsets: [rows + 1] int64, the beginning of each row, and the end of the last.
    """

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> RaggedArray:
        """Concatenate `rows`."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.fromiter((token for row in rows for token in row), np.int32, int(offsets[-1]))
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return row number `row`, a 1-dim int32 array."""
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
    """Columns with the same number of rows, and counts of cut rows."""

    columns: dict[str, RaggedArray]
    counts: dict[str, int]


@dataclass(frozen=True)
class TokenizedDemonstrations:
    """Demonstrations: prompts and responses, of which `cut` and `cut_responses` were cut."""

    prompt_ids: RaggedArray
    response_ids: RaggedArray
    cut: int
    cut_responses: int

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class TokenizedPreferences:
    """Preferences: prompts with both responses, of which `cut` and `cut_responses` were cut."""

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
        original: the data set's responses; an empty row if there is none.
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

    Prompts are cut from the left so that the response is complete; a response that is too long by
    itself is cut from the right. `cache` is the folder of cached sets (`None`: no cache).
    """
    _check_length(seq_length)

    def build() -> RaggedColumns:
        builder = _ColumnBuilder(codec, "prompt_ids", "response_ids")
        prompts = codec.encode_prompts([row.history for row in rows])
        responses = codec.encode_responses([row.response for row in rows])
        for prompt, response in zip(prompts, responses, strict=True):
            (response_ids,) = builder.with_eos(seq_length - 1, response)
            builder.add(
                prompt_ids=builder.cut_left(prompt, seq_length - len(response_ids)),
                response_ids=response_ids,
            )
        return builder.build()

    return TokenizedDemonstrations(
        **_tokenized(cache, "demonstrations", rows, codec, [seq_length], build)
    )


def tokenize_preferences(
    rows: Sequence[Preference], codec: Codec, seq_length: int, cache: Path | None = None
) -> TokenizedPreferences:
    """Tokenize pairs to at most `seq_length` tokens each side; both keep the same prompt."""
    _check_length(seq_length)

    def build() -> RaggedColumns:
        builder = _ColumnBuilder(codec, "prompt", "chosen", "rejected")
        prompts = codec.encode_prompts([row.history for row in rows])
        chosen = codec.encode_responses([row.chosen for row in rows])
        rejected = codec.encode_responses([row.rejected for row in rows])
        for prompt, *sides in zip(prompts, chosen, rejected, strict=True):
            chosen_ids, rejected_ids = builder.with_eos(seq_length - 1, *sides)
            prompt_length = seq_length - max(len(chosen_ids), len(rejected_ids))
            builder.add(
                prompt=builder.cut_left(prompt, prompt_length),
                chosen=chosen_ids,
                rejected=rejected_ids,
            )
        return builder.build()

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
    prompt_length = _max_prompt_length(seq_length, max_new_tokens)

    def build() -> RaggedColumns:
        builder = _ColumnBuilder(codec, "prompt", "original")
        prompts = codec.encode_prompts([row.history for row in rows])
        originals = codec.encode_responses([row.original or "" for row in rows])
        for row, prompt, original in zip(rows, prompts, originals, strict=True):
            original_ids = (
                [] if row.original is None else builder.with_eos(max_new_tokens, original)[0]
            )
            builder.add(prompt=builder.cut_left(prompt, prompt_length), original=original_ids)
        return builder.build()

    lengths = [seq_length, max_new_tokens]
    return TokenizedPrompts(**_tokenized(cache, "prompts", rows, codec, lengths, build))


def tokenize_texts(
    texts: Sequence[str], codec: Codec, seq_length: int, max_new_tokens: int
) -> TokenizedPrompts:
    """Tokenize texts to be continued as they are, cut from the left as prompts are.

    Raises:
        UserError: nothing would remain of a text.
    """
    prompt_length = _max_prompt_length(seq_length, max_new_tokens)
    builder = _ColumnBuilder(codec, "prompt", "original")
    for ids in codec.encode_texts(texts):
        builder.add(prompt=builder.cut_left(ids, prompt_length), original=[])
    tokenized = builder.build()
    fields: dict[str, Any] = {**tokenized.columns, **tokenized.counts}
    return TokenizedPrompts(**fields)


def _max_prompt_length(seq_length: int, max_new_tokens: int) -> int:
    """Return the most tokens of a prompt, so that `max_new_tokens` more fit; at least 1."""
    prompt_length = seq_length - max_new_tokens
    if prompt_length < 1 or max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} and seq_length {seq_length}: that leaves "
            f"{prompt_length} tokens for a prompt; both must be at least 1. Lower "
            "max_new_tokens or raise seq_length"
        )
    return prompt_length


def _check_length(seq_length: int) -> None:
    if seq_length < 2:
        raise UserError(
            f"seq_length is {seq_length}; a prompt and a response need at least 2 tokens together"
        )


class _ColumnBuilder:
    """Builds columns row by row: cuts ids to length and counts the cuts."""

    def __init__(self, codec: Codec, *names: str) -> None:
        self._eos, self._bos = codec.eos_id, codec.bos_id
        self._rows: dict[str, list[list[int]]] = {name: [] for name in names}
        self._counts = {"cut": 0, "cut_responses": 0}

    def with_eos(self, max_length: int, *responses: list[int]) -> list[list[int]]:
        """Return the responses with the end-of-sequence token, cut from the right."""
        self._counts["cut_responses"] += sum(len(ids) + 1 > max_length for ids in responses)
        return [[*ids, self._eos][:max_length] for ids in responses]

    def cut_left(self, ids: list[int], max_length: int) -> list[int]:
        """Return `ids` cut from the left, but for a beginning-of-sequence token."""
        if len(ids) <= max_length:
            return ids
        self._counts["cut"] += 1
        if max_length > 1 and ids[0] == self._bos:
            return [ids[0], *ids[len(ids) - max_length + 1 :]]
        return ids[len(ids) - max_length :]

    def add(self, **row: list[int]) -> None:
        for name, ids in row.items():
            self._rows[name].append(ids)

    def build(self) -> RaggedColumns:
        columns = {name: RaggedArray.of(rows) for name, rows in self._rows.items()}
        return RaggedColumns(columns, self._counts)


def _tokenized(
    cache: Path | None,
    kind: str,
    rows: Sequence[Row],
    codec: Codec,
    lengths: list[int],
    build: Callable[[], RaggedColumns],
) -> dict[str, Any]:
    """Return the fields of a tokenized set, from the cache if it has them."""
    key: list[str | int] = [_CACHE_FORMAT, kind, rows_digest(rows), codec.digest, *lengths]
    tokenized = build() if cache is None else load_or_build(cache, key, build)
    return {**tokenized.columns, **tokenized.counts}


def load_or_build(
    folder: Path, key: list[str | int], build: Callable[[], RaggedColumns]
) -> RaggedColumns:
    """Return the columns cached in `folder` under `key`; build them if missing or damaged.

    An entry appears complete or not at all, so that processes may share a folder without a lock:
    two that build the same entry write the same bytes, and the first one stays.

    Raises:
        UserError: the folder cannot be written.
    """
    entry = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    stored = _read(entry)
    if stored is not None:
        return stored
    built = build()
    try:
        _write(entry, built)
    except OSError as error:
        raise UserError(
            f"cannot keep tokenized data in {folder}: {error}; free some space or name another "
            "folder"
        ) from error
    return _read(entry) or built


def _read(entry: Path) -> RaggedColumns | None:
    """Return the columns in `entry`, memory-mapped; `None` if it is missing or damaged."""
    if not entry.is_dir():
        return None
    try:
        check_sealed_folder(entry)
        counts = json.loads((entry / "counts.json").read_text())
        columns = {
            path.name.removesuffix(".offsets.npy"): RaggedArray(
                _load(path.with_name(path.name.replace(".offsets.", ".flat."))), _load(path)
            )
            for path in sorted(entry.glob("*.offsets.npy"))
        }
    except (OSError, ValueError) as error:
        # An entry without digests was made by an earlier version, whose flushing was incomplete.
        if isinstance(error, Damaged) or (entry / DIGESTS).exists():
            log.warning("cache of tokenized data: %s; it is made again", error)
        return None
    complete = columns and all(len(c.flat) == c.offsets[-1] for c in columns.values())
    return RaggedColumns(columns, counts) if complete else None


def _whole(entry: Path) -> bool:
    try:
        return bool(check_sealed_folder(entry))
    except (OSError, Damaged):
        return False


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write(entry: Path, content: RaggedColumns) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    staging = draft_of(entry)
    try:
        staging.mkdir()
        for name, column in content.columns.items():
            np.save(staging / f"{name}.flat.npy", column.flat)
            np.save(staging / f"{name}.offsets.npy", column.offsets)
        (staging / "counts.json").write_text(json.dumps(content.counts))
        seal_folder(staging)
        if not _whole(entry):
            shutil.rmtree(entry, ignore_errors=True)
        try:
            staging.rename(entry)
        except OSError:
            if not _whole(entry):
                raise
        sync(entry.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
