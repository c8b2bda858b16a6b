"""Rows, their digest and the key of a prompt."""

from __future__ import annotations

from rlhf_exp.data.rows import Demonstration, Prompt, Turn, prompt_key, rows_digest

ASKED = (Turn("human", "How do I grow tomatoes?"),)


def test_a_prompts_key_levels_case_space_and_compatible_letters() -> None:
    key = prompt_key(ASKED)
    assert key == prompt_key((Turn("human", "  how do I  grow\nTOMATOES?"),))
    assert key == prompt_key((Turn("human", "How do I grow toma\uff54oes?"),))  # a full-width t


def test_a_prompts_key_tells_speakers_and_turns_apart() -> None:
    texts = [
        (Turn("human", "a"), Turn("human", "b")),
        (Turn("human", "a"), Turn("assistant", "b")),
        (Turn("human", "a b"),),
        (Turn("human", "b"), Turn("human", "a")),
    ]
    assert len({prompt_key(history) for history in texts}) == 4


def test_a_prompts_key_survives_lone_surrogates() -> None:
    assert len(prompt_key((Turn("human", "\ud83d"),))) == 64


def test_digest_is_of_content_and_order_but_not_of_origin() -> None:
    one, two = Demonstration(ASKED, "Water them.", "a:1"), Demonstration(ASKED, "No.", "a:2")
    moved = Demonstration(ASKED, "Water them.", "elsewhere:9")
    assert rows_digest([one, two]) == rows_digest([moved, two])
    assert rows_digest([one, two]) != rows_digest([two, one])
    assert rows_digest([one]) != rows_digest([one, two])
    assert rows_digest([Prompt(ASKED, None, "")]) != rows_digest([Prompt(ASKED, "", "")])
