"""Prompts as turns."""

from __future__ import annotations

import pytest

from rlhf_exp.data.dialogue import turns_of


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", [("Human", "Hi")]),
        (
            "Human: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
            [("Human", "Hi"), ("Assistant", "Yes?"), ("Human", "Bye")],
        ),
        ("Be kind.\n\nHuman: a\n\nb\n\nAssistant: ", [("", "Be kind."), ("Human", "a\n\nb")]),
        ("No dialogue: Human: here", [("", "No dialogue: Human: here")]),
        ("\n\nHuman:\n\nAssistant: x", [("Human", ""), ("Assistant", "x")]),
        ("", []),
    ],
)
def test_turns(prompt: str, turns: list[tuple[str, str]]) -> None:
    assert turns_of(prompt) == turns
