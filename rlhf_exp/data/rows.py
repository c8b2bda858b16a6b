"""Text rows of a data set: prompts, demonstrations and preferences, and their splits.

Every source yields these rows, before any tokenizer is known. A *history* is a dialogue up to and
including the human turn that asks for a response; a system turn may begin it. A row's `origin`
("file:line", "toy:17") lets errors point at it. Its `fields` are all that its record holds beside
prompt and responses (a reference answer, a source), as the file has them: they travel with the
prompt to rewards that ask for them, and take no part in what models read.

Prompts are held out by the hash of their own text, levelled (`prompt_key`). So a prompt stays in
its split when a file grows or is shuffled, and all rows of one prompt, of whatever kind, are in one
split, with those of near copies. Two prompts are the same only if their texts are: `x²` and `x2`
are different questions.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Role = Literal["system", "human", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; `text` carries no marker and no surrounding white space."""

    role: Role
    text: str


History = tuple[Turn, ...]
Fields = Mapping[str, object]
"""The other fields of a record, by name."""


@dataclass(frozen=True)
class Prompt:
    """A history to answer; `original` is the data set's own response, if it has one."""

    history: History
    original: str | None
    origin: str
    fields: Fields = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Demonstration:
    """A history and a response to imitate."""

    history: History
    response: str
    origin: str
    fields: Fields = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Preference:
    """A history and two responses, the first preferred to the second."""

    history: History
    chosen: str
    rejected: str
    origin: str
    fields: Fields = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class UnusableRow:
    """A row that could not be used, and why."""

    origin: str
    reason: str


Row = Prompt | Demonstration | Preference


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Three disjoint lists of rows; no prompt occurs in two of them."""

    train: list[T] = field(default_factory=list)
    validation: list[T] = field(default_factory=list)
    test: list[T] = field(default_factory=list)

    def all(self) -> Iterable[tuple[str, list[T]]]:
        """Return the splits with their names."""
        return (("train", self.train), ("validation", self.validation), ("test", self.test))


@dataclass(frozen=True)
class SourceFile:
    """What was found in one file, or in one split of a data set.

    Attributes:
        name: its path, or the split's label.
        kind: what the file is, in words.
        layouts: numbers of records by layout.
        kept: names of the fields that are kept beside prompt and responses.
        read: number of records.
    """

    name: str
    kind: str
    layouts: dict[str, int]
    kept: list[str]
    read: int


@dataclass(frozen=True)
class Corpus:
    """All rows of one source.

    Attributes:
        demonstrations: for SFT.
        preferences: for the reward model.
        prompts: for PPO (train) and evaluation (validation, test).
        unusable: rows that could not be used, with reasons.
        dropped: usable rows left out because their prompt is a test prompt.
        digest: sha256 of all rows' content, in order.
        counts: numbers of rows that were normalised or not used in some way, by what was done.
        left_out: why nothing of an input may be trained on, where that is so; or "".
        files: what was found in each file.
    """

    demonstrations: Splits[Demonstration]
    preferences: Splits[Preference]
    prompts: Splits[Prompt]
    unusable: list[UnusableRow]
    dropped: int
    digest: str
    counts: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    files: list[SourceFile] = field(default_factory=list)


def make_corpus(
    demonstrations: Splits[Demonstration],
    preferences: Splits[Preference],
    prompts: Splits[Prompt],
    unusable: list[UnusableRow],
    dropped: int = 0,
    counts: dict[str, int] | None = None,
) -> Corpus:
    """Return the corpus of these rows, with its digest."""
    digest = hashlib.sha256()
    for kind in (demonstrations, preferences, prompts):
        for name, rows in kind.all():
            digest.update(f"{name}:{rows_digest(rows)}\n".encode())
    return Corpus(
        demonstrations, preferences, prompts, unusable, dropped, digest.hexdigest(), counts or {}
    )


def rows_digest(rows: Iterable[Row]) -> str:
    """Return the sha256 of the rows' content in order; origins and other fields do not count."""
    digest = hashlib.sha256()
    for row in rows:
        content = asdict(replace(row, fields={}))
        del content["origin"], content["fields"]
        line = json.dumps([type(row).__name__, content], sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def convert_row(row: Row, kind: type[Row] | None) -> Row:
    """Return `row` as a row of `kind`; None leaves it as it is.

    Raises:
        ValueError: it has too few fields for that kind.
    """
    if kind is None or isinstance(row, kind):
        return row
    if kind is Prompt:
        return _as_prompt(row)
    if kind is Demonstration and isinstance(row, Preference) and row.chosen:
        return Demonstration(row.history, row.chosen, row.origin, row.fields)
    expected = "a prompt with a response" if kind is Demonstration else "`chosen` and `rejected`"
    raise ValueError(f"{expected} expected, found a {type(row).__name__.lower()}")


def _as_prompt(row: Row) -> Prompt:
    if isinstance(row, Prompt):
        return row
    original = row.chosen if isinstance(row, Preference) else row.response
    return Prompt(row.history, original, row.origin, row.fields)


def reward_fields(row: Row) -> dict[str, object]:
    """Return what a reward sees of a row: the other fields of its record, and its own response.

    The response is called `response`, unless the record has another field of that name.
    """
    prompt = _as_prompt(row)
    own = {} if prompt.original is None else {"response": prompt.original}
    return own | dict(prompt.fields)


def responses_of(row: Row) -> tuple[str, ...]:
    """Return a row's responses, the one to imitate first."""
    if isinstance(row, Preference):
        return row.chosen, row.rejected
    if isinstance(row, Demonstration):
        return (row.response,)
    return () if row.original is None else (row.original,)


def preferences_of(rows: Sequence[Row]) -> list[Preference]:
    """Return the preference pairs among the rows."""
    return [row for row in rows if isinstance(row, Preference)]


def demonstrations_of(rows: Iterable[Row], derived: bool) -> list[Demonstration]:
    """Return the demonstrations among the rows; `derived`: the pairs' chosen responses instead."""
    if not derived:
        return [row for row in rows if isinstance(row, Demonstration)]
    return [
        Demonstration(row.history, row.chosen, row.origin, row.fields)
        for row in rows
        if isinstance(row, Preference) and row.chosen
    ]


def prompts_of(rows: Iterable[Row], derived: bool) -> list[Prompt]:
    """Return the prompts among the rows; `derived`: those of all rows. Equal ones stay."""
    return [_as_prompt(row) for row in rows if derived or isinstance(row, Prompt)]


def first_of_equal(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the first of the prompts with the same text, for each text."""
    first: dict[History, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.history, prompt)
    return list(first.values())


def prompt_key(history: History) -> str:
    """Return the sha256 that decides a prompt's split; it does not tell whether two are the same.

    Case, white space and compatible Unicode characters are normalised first, so that near copies of
    a prompt are in the same split.
    """
    turns = [
        f"{turn.role}:{' '.join(unicodedata.normalize('NFKC', turn.text).casefold().split())}"
        for turn in history
    ]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def held_out_keys(
    keys: Iterable[str],
    test_keys: set[str],
    validation_fraction: float,
    test_fraction: float,
) -> tuple[set[str], set[str]]:
    """Return the keys of the validation and of the test prompts.

    The prompts with the highest hashes are for validation, those with the lowest for test, unless
    the source has a test split of its own. A fraction above 0 holds out at least one prompt, if
    that leaves one to train on.

    Args:
        keys: `prompt_key` of every row.
        test_keys: keys of the source's own test split; empty if it has none.
        validation_fraction: expected share of the prompts held out for validation.
        test_fraction: the same for test; not used if there are `test_keys`.
    """
    undecided = sorted(set(keys) - test_keys)
    test = test_keys
    if not test_keys:
        fractions = [_hash_fraction(key) for key in undecided]
        test = set(undecided[: _count_below(fractions, test_fraction)])
        undecided = undecided[len(test) :]
    from_above = [1 - _hash_fraction(key) for key in reversed(undecided)]
    validation = set(undecided[len(undecided) - _count_below(from_above, validation_fraction) :])
    return validation, test


def part_number(key: str, parts: int) -> int:
    """Return the part, 1 to `parts`, that a prompt's `prompt_key` belongs to.

    It depends on other digits of the hash than `held_out_keys`, so parts do not follow the splits.
    """
    return int(key[16:32], 16) % parts + 1


_HASH_RANGE = 2**64


def _hash_fraction(key: str) -> float:
    """Return a key's position in the range of hashes, from 0 to 1."""
    return int(key[:16], 16) / _HASH_RANGE


def _count_below(values: Sequence[float], fraction: float) -> int:
    """Return how many of the ascending `values` are below `fraction`: at least 1, but not all."""
    if fraction <= 0:
        return 0
    below = sum(place < fraction for place in values)
    return max(min(max(below, 1), len(values) - 1), 0)
