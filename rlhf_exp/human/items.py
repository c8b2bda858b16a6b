"""What annotators judge: a prompt with two answers, pinned by a hash of its text.

Also which side and in which order an annotator sees them: functions of a seed, so that nothing has
to be stored to show the same page again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_exp.data.jsonl import Unreadable, read_jsonl
from rlhf_exp.errors import UserError

TEXTS = ("prompt", "answer_a", "answer_b")


@dataclass(frozen=True)
class Item:
    """One prompt and the answers of models a and b.

    Attributes:
        prompt: text; a dialogue with HH's markers, or anything else.
        answer_a: the baseline's answer.
        answer_b: the other model's answer.
    """

    prompt: str
    answer_a: str
    answer_b: str

    @cached_property
    def id(self) -> str:
        """The first 24 hexadecimal digits of the sha256 of the three texts."""
        content = json.dumps([self.prompt, self.answer_a, self.answer_b])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    @property
    def identical(self) -> bool:
        """Whether both answers are the same to a reader."""
        return self.answer_a.strip() == self.answer_b.strip()


def item_of(prompt: str, answer_a: str, answer_b: str) -> Item:
    """Return the item; halves of surrogate pairs, which no database stores, are replaced."""
    return Item(*(_storable(text) for text in (prompt, answer_a, answer_b)))


def items_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the items of rows that hold `prompt`, `answer_a` and `answer_b`; each item once."""
    found = (item_of(*(str(row[name]) for name in TEXTS)) for row in rows)
    return list({item.id: item for item in found}.values())


def read_pairs(path: Path) -> list[Item]:
    """Read items from JSON lines.

    Raises:
        UserError: the file is missing, or a line is no JSON object with three texts.
    """
    rows = []
    for origin, record in read_jsonl(path, "annotate"):
        if isinstance(record, Unreadable):
            raise UserError(f"{origin}: {record.reason}")
        fields = record if isinstance(record, Mapping) else {}
        wrong = [name for name in TEXTS if not isinstance(fields.get(name), str)]
        if wrong:
            raise UserError(
                f"{origin}: expected a JSON object with the texts {', '.join(TEXTS)}; "
                f"{' and '.join(wrong)} is missing or no text"
            )
        rows.append(fields)
    if not rows:
        raise UserError(f"{path}: no rows; expected one pair of answers a line")
    return items_of_rows(rows)


def choose(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """Return `count` items by a seeded order; a smaller number is part of a larger one."""
    ordered = sorted(items, key=lambda item: _hash(seed, "choose", item.id))
    return ordered if count is None else ordered[:count]


def order(items: Sequence[Item], seed: int, annotator: str) -> list[Item]:
    """Return the items in the order in which an annotator sees them."""
    return sorted(items, key=lambda item: _hash(seed, "order", item.id, annotator))


def side_of(seed: int, item: str, annotator: str) -> int:
    """Return 0 if the annotator sees model a's answer as A, 1 if as B."""
    return _hash(seed, "side", item, annotator) & 1


def _hash(seed: int, *parts: str) -> int:
    content = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _storable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
