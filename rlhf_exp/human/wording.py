"""The words annotators read, where the owner gives no others."""

from __future__ import annotations

import re

from rlhf_exp.errors import UserError

CRITERION = re.compile(r"[a-z][a-z0-9_-]{0,30}")
INSTRUCTIONS = "\n\n".join(
    (
        "You will see conversations between a person and an assistant, each with two possible "
        "answers to the person's last message. Say which answer you prefer.",
        "Read the whole conversation and both answers first. Judge what an answer says and how: "
        "whether it helps with what was asked, whether it is true, and whether it could do harm. "
        "A longer answer is not better because it is longer.",
        "Choose a tie where you cannot prefer one of them: both are equally good, or equally bad.",
        "Some texts are offensive, and some make no sense. They were written by computer programs. "
        "You may stop at any time: answers are saved one by one, and your link brings you back.",
    )
)


def question(criterion: str) -> str:
    """Return what is asked: `overall` is special, other criteria are adjectives."""
    if criterion == "overall":
        return "Which answer is better overall?"
    return f"Which answer is more {criterion.replace('_', ' ')}?"


def checked_criteria(names: list[str]) -> tuple[str, ...]:
    """Return the criteria.

    Raises:
        UserError: none, one twice, or one that cannot name a form's field.
    """
    for name in names:
        if not CRITERION.fullmatch(name):
            raise UserError(
                f"--criteria: {name!r} is no criterion; expected words of small letters, digits, "
                "'_' and '-', such as overall,helpful,harmless"
            )
    if not names or len(set(names)) < len(names):
        raise UserError(f"--criteria: {','.join(names)!r} names none, or one of them twice")
    return tuple(names)
