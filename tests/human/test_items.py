"""Items, sides and order."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from rlhf_exp.errors import UserError
from rlhf_exp.human.items import choose, item_of, items_of_rows, order, read_pairs, side_of
from tests.human.lab import items
from tests.lab import jsonl


def test_an_item_is_pinned_by_its_texts() -> None:
    one = item_of("p", "x", "y")
    assert one.id == item_of("p", "x", "y").id
    assert len({one.id, item_of("p", "y", "x").id, item_of("p", "xy", "").id}) == 3
    assert item_of("p", "x \n", " x").identical
    assert not one.identical
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y", "score_a": 1.0}
    assert items_of_rows([row, row]) == [one]


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    texts = item_of("\ud800 a", "b \udc00", "\U0001f600 \u202e")
    assert (texts.prompt, texts.answer_a) == ("\ufffd a", "b \ufffd")
    assert texts.answer_b == "\U0001f600 \u202e"


def test_sides_are_balanced_over_items_and_over_annotators() -> None:
    sides = {name: [side_of(0, item.id, name) for item in items(1000)] for name in ("anna", "ben")}
    for found in sides.values():
        assert stats.binomtest(sum(found), 1000).pvalue > 0.001
    # One annotator's sides tell nothing about another's.
    equal = sum(a == b for a, b in zip(sides["anna"], sides["ben"], strict=True))
    assert stats.binomtest(equal, 1000).pvalue > 0.001
    assert sides["anna"] == [side_of(0, item.id, "anna") for item in items(1000)]
    assert sides["anna"] != [side_of(1, item.id, "anna") for item in items(1000)]


def test_every_annotator_has_an_order_of_her_own() -> None:
    anna, ben = (order(items(50), 0, name) for name in ("anna", "ben"))
    assert anna != ben
    assert {item.id for item in anna} == {item.id for item in ben}
    assert anna == order(items(50)[::-1], 0, "anna")


def test_a_smaller_choice_is_part_of_a_larger_one() -> None:
    few, many = choose(items(50), 5, 0), choose(items(50), 20, 0)
    assert few == many[:5]
    assert few != choose(items(50), 5, 1)
    assert len(choose(items(3), None, 0)) == 3


def test_pairs_from_a_file(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
    assert read_pairs(jsonl(tmp_path / "a.jsonl", [row])) == [item_of("p", "x", "y")]
    with pytest.raises(UserError, match=r"b.jsonl:2: expected .*answer_b is missing or no text"):
        read_pairs(jsonl(tmp_path / "b.jsonl", [row, {"prompt": "p", "answer_a": "x"}]))
    with pytest.raises(UserError, match=r"b.jsonl:1: .* prompt is missing or no text"):
        read_pairs(jsonl(tmp_path / "b.jsonl", [row | {"prompt": None}]))
    with pytest.raises(UserError, match=r"c.jsonl:1: not JSON"):
        read_pairs(jsonl(tmp_path / "c.jsonl", ["{"]))
    with pytest.raises(UserError, match="no rows"):
        read_pairs(jsonl(tmp_path / "d.jsonl", []))
