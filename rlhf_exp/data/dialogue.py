"""A prompt as turns, where it is written as a dialogue of `Human:` and `Assistant:`."""

from __future__ import annotations

import re

_MARK = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def turns_of(prompt: str) -> list[tuple[str, str]]:
    """Return (role, text) of each turn; the role is empty for text that is no dialogue.

    The empty turn at the end, which asks the model to speak, is left out. Text that imitates the
    marks looks like turns here, as it does to the model.
    """
    parts = _MARK.split(prompt)
    before, marked = parts[0].strip(), parts[1:]
    turns = [("", before)] if before or not marked else []
    turns += [(role, text.strip()) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    return [turn for number, turn in enumerate(turns) if turn[1] or number < len(turns) - 1]
