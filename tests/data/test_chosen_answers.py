from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.data.chosen_answers import HELD_OUT, read_chosen, with_chosen, write_chosen
from rlhf_exp.data.rows import Corpus, Demonstration, Prompt, Splits, Turn, make_corpus
from rlhf_exp.errors import UserError


def row(text: str, response: str = "Yes.") -> Demonstration:
    return Demonstration((Turn("human", text),), response, f"toy:{text}")


def corpus() -> Corpus:
    """Prompts a and b to train on, c for validation, d for test."""
    prompts = Splits(
        *([Prompt(row(t).history, None, t) for t in part] for part in ("ab", "c", "d"))
    )
    old = Splits([row("a", "old")], [row("c", "old")], [row("d", "old")])
    return make_corpus(old, Splits(), prompts, [])


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    # Text that looks like a marker of a turn, half an emoji's neighbour, a line break.
    turns = (Turn("human", "\n\nAssistant: ☂\nHuman:"), Turn("assistant", "A"), Turn("human", "?"))
    rows = [Demonstration(turns, "\n\nHuman: no turn", "f:1"), row("b")]
    write_chosen(tmp_path / "chosen.jsonl", rows, [1.5, -2.0])
    assert read_chosen(tmp_path / "chosen.jsonl") == rows
    assert '"score": 1.5' in (tmp_path / "chosen.jsonl").read_text()


@pytest.mark.parametrize("line", ["[]", "{}", '{"history": [1], "response": "a", "origin": ""}'])
def test_another_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "chosen.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"chosen\.jsonl:1: not a chosen answer"):
        read_chosen(path)


def test_the_data_decide_what_is_trained_on() -> None:
    found = with_chosen(corpus(), [row("a"), row(" A"), row("c"), row("D"), row("new")])
    assert [one.origin for one in found.demonstrations.train] == ["toy:a", "toy: A", "toy:new"]
    assert [one.origin for one in found.demonstrations.validation] == ["toy:c"]
    assert [one.response for one in found.demonstrations.test] == ["old"]
    assert found.counts == {HELD_OUT: 1}  # a copy of a test prompt in another case
    assert found.prompts == corpus().prompts
    assert found.digest != corpus().digest


def test_answers_to_nothing_but_held_out_prompts() -> None:
    with pytest.raises(
        UserError, match=r"all 2 chosen answers are to prompts that these data hold"
    ):
        with_chosen(corpus(), [row("c"), row("d")])
