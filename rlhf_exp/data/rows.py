"""Validated text rows: what every source yields, before any tokenizer is known.

A *history* is a dialogue up to and including the human turn that asks for a response. Rows carry an
`origin` ("file:line", "toy:17"), so that whatever is wrong with one can be pointed at.

What one kind of row can stand in for: pairs as demonstrations and prompts, and so on.

Which prompts are held out, by hash.

Where a prompt goes depends on nothing but its own text, so that it stays there when a file grows or
is shuffled, and all rows of one prompt stay together, of whatever kind they are.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Role = Literal["human", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; `text` carries no marker and no surrounding white space."""

    role: Role
    text: str


History = tuple[Turn, ...]


@dataclass(frozen=True)
class Prompt:
    """A history to answer; `original` is the data set's own response, where it has one."""

    history: History
    original: str | None
    origin: str


@dataclass(frozen=True)
class Demonstration:
    """A history and a response to imitate."""

    history: History
    response: str
    origin: str


@dataclass(frozen=True)
class Preference:
    """A history and two responses, the first preferred to the second."""

    history: History
    chosen: str
    rejected: str
    origin: str


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
class Corpus:
    """All that one source has to offer.

    Attributes:
        demonstrations: for SFT.
        preferences: for the reward model.
        prompts: for PPO (train) and evaluation (validation, test).
        unusable: the rows that could not be used.
        dropped: usable rows left out because their prompt belongs to another split.
        digest: sha256 of all rows' content, in order.
    """

    demonstrations: Splits[Demonstration]
    preferences: Splits[Preference]
    prompts: Splits[Prompt]
    unusable: list[UnusableRow]
    dropped: int
    digest: str


def make_corpus(
    demonstrations: Splits[Demonstration],
    preferences: Splits[Preference],
    prompts: Splits[Prompt],
    unusable: list[UnusableRow],
    dropped: int = 0,
) -> Corpus:
    """Return the corpus of these rows, with its digest."""
    digest = hashlib.sha256()
    for kind in (demonstrations, preferences, prompts):
        for name, rows in kind.all():
            digest.update(f"{name}:{rows_digest(rows)}\n".encode())
    return Corpus(demonstrations, preferences, prompts, unusable, dropped, digest.hexdigest())


def rows_digest(rows: Iterable[Row]) -> str:
    """Return the sha256 of the rows' content in order; where they came from does not count."""
    digest = hashlib.sha256()
    for row in rows:
        content = asdict(row)
        del content["origin"]
        line = json.dumps([type(row).__name__, content], sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def prompt_key(history: History) -> str:
    """Return the sha256 that decides a prompt's split.

    Case, white space and Unicode's compatible spellings are levelled first, so that near copies of
    one prompt cannot end up on both sides of a split.
    """
    turns = [
        f"{turn.role}:{' '.join(unicodedata.normalize('NFKC', turn.text).casefold().split())}"
        for turn in history
    ]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def convert_row(row: Row, kind: type[Row] | None) -> Row:
    """Return `row` as what it was given for.

    Raises:
        ValueError: it has too few fields for that.
    """
    if kind is None or isinstance(row, kind):
        return row
    if kind is Prompt:
        return _as_prompt(row)
    if kind is Demonstration and isinstance(row, Preference) and row.chosen:
        return Demonstration(row.history, row.chosen, row.origin)
    wanted = "a prompt with a response" if kind is Demonstration else "`chosen` and `rejected`"
    raise ValueError(f"{wanted} expected, found a {type(row).__name__.lower()}")


def _as_prompt(row: Row) -> Prompt:
    if isinstance(row, Prompt):
        return row
    original = row.chosen if isinstance(row, Preference) else row.response
    return Prompt(row.history, original, row.origin)


def preferences_of(rows: Sequence[Row]) -> list[Preference]:
    """Return the pairs."""
    return [row for row in rows if isinstance(row, Preference)]


def demonstrations_of(rows: Sequence[Row]) -> list[Demonstration]:
    """Return the demonstrations given, or else the pairs' chosen sides that say something."""
    given = [row for row in rows if isinstance(row, Demonstration)]
    return given or [
        Demonstration(row.history, row.chosen, row.origin)
        for row in preferences_of(rows)
        if row.chosen
    ]


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return the prompts given, or else those of all rows; each prompt once, as it came first."""
    given = [row for row in rows if isinstance(row, Prompt)]
    first: dict[str, Prompt] = {}
    for prompt in given or map(_as_prompt, rows):
        first.setdefault(prompt_key(prompt.history), prompt)
    return list(first.values())


_RANGE = 2**64


def held_out_keys(
    keys: Iterable[str],
    own_test: set[str],
    validation_fraction: float,
    test_fraction: float,
) -> tuple[set[str], set[str]]:
    """Return the keys of the validation and of the test prompts.

    The highest hashes are put aside for validation; the lowest for test, unless the source has a
    test split of its own. A fraction above 0 puts aside at least one prompt, as long as that leaves
    one to train on.

    Args:
        keys: `prompt_key` of every row.
        own_test: keys of the source's own test split, or none.
        validation_fraction: of the hashes' range.
        test_fraction: the same; not used if there is an `own_test`.
    """
    free = sorted(set(keys) - own_test)
    test = own_test
    if not own_test:
        places = [_place(key) for key in free]
        test = set(free[: _count_below(places, test_fraction)])
        free = free[len(test) :]
    from_the_top = [1 - _place(key) for key in reversed(free)]
    validation = set(free[len(free) - _count_below(from_the_top, validation_fraction) :])
    return validation, test


def part_number(key: str, parts: int) -> int:
    """Return the part, 1 to `parts`, that a prompt's `prompt_key` belongs to.

    By other digits of the hash than `held_out_keys`, so that every part is drawn from the whole range.
    """
    return int(key[16:32], 16) % parts + 1


def _place(key: str) -> float:
    """Return where in the hashes' range, 0 to 1, a key lies."""
    return int(key[:16], 16) / _RANGE


def _count_below(places: Sequence[float], fraction: float) -> int:
    """Return how many of the rising `places` lie below `fraction`: at least 1, but not all."""
    if fraction <= 0:
        return 0
    below = sum(place < fraction for place in places)
    return max(min(max(below, 1), len(places) - 1), 0)
