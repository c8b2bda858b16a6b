r"""Dialogues as Anthropic's HH data writes them: turns marked `\n\nHuman:` and `\n\nAssistant:`.

Real files hold two turns of one speaker in a row, empty responses, markers inside a line (part of
the text, since only the blank line before it makes a marker) and pairs whose sides part ways
earlier than at their last response.
"""

from __future__ import annotations

import re

from rlhf_exp.data.rows import History, Role, Turn

_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "human", "Assistant": "assistant"}


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """Return the turns of a marked dialogue; a last turn that only cues the assistant is empty.

    Raises:
        ValueError: the text does not begin with a marker.
    """
    parts = _MARKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"no `Human:` or `Assistant:` at the beginning of {_start_of(text)}")
    return tuple(
        Turn(_ROLES[name], said.strip())
        for name, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def parse_prompt(text: str) -> History:
    """Return the history in `text`: a marked dialogue, or plain text as one human turn.

    Raises:
        ValueError: nothing is asked: the text or the last human turn is empty.
    """
    if not _MARKER.match(text):
        return checked_history((Turn("human", text.strip()),))
    turns = parse_dialogue(text)
    if turns[-1] == Turn("assistant", ""):
        turns = turns[:-1]
    return checked_history(turns)


def dialogue(history: History) -> str:
    """Return a history as a marked dialogue, up to where the assistant speaks."""
    turns = [f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in history]
    return "".join(turns) + "\n\nAssistant:"


def checked_history(turns: tuple[Turn, ...]) -> History:
    """Return `turns` if they can be answered.

    Raises:
        ValueError: they do not end with something said by the human.
    """
    if not turns or turns[-1].role != "human":
        raise ValueError("the prompt does not end with a human turn")
    if not turns[-1].text:
        raise ValueError("the prompt's last human turn is empty")
    return turns


def split_dialogue(turns: tuple[Turn, ...]) -> tuple[History, str]:
    """Return a dialogue's history and its last response.

    Raises:
        ValueError: it does not end with a response to something.
    """
    if turns[-1].role != "assistant":
        raise ValueError("the dialogue does not end with an assistant turn")
    return checked_history(turns[:-1]), turns[-1].text


def pair_from_dialogues(chosen: str, rejected: str) -> tuple[History, str, str]:
    """Return the history that two whole dialogues share, and how each goes on.

    The history is the longest common run of turns that ends with the human. What follows is one
    response, or, where a side goes on for several turns, all of them with their markers.

    Raises:
        ValueError: the dialogues share no history, do not differ, or are empty after it.
    """
    sides = parse_dialogue(chosen), parse_dialogue(rejected)
    shared = 0
    for number, (left, right) in enumerate(zip(*sides, strict=False), 1):
        if left != right:
            break
        if left.role == "human":
            shared = number
    if not shared:
        raise ValueError("the two dialogues share no human turn to begin with")
    history = checked_history(sides[0][:shared])
    good, bad = (_continuation(turns[shared:]) for turns in sides)
    if good == bad:
        raise ValueError("both responses are empty" if not good else "the responses are identical")
    return history, good, bad


def _continuation(turns: tuple[Turn, ...]) -> str:
    if not turns:
        return ""
    if turns[0].role != "assistant":
        raise ValueError("a human turn stands where the response should be")
    marked = [f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in turns[1:]]
    return turns[0].text + "".join(marked)


def _start_of(text: str) -> str:
    return repr(text[:40]) + ("..." if len(text) > 40 else "")
