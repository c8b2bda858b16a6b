"""The rule that says whether an answer to a sum of `data=arithmetic` is right.

An answer is right if the last number in it is the result. The rule is exact, so it serves as a
reward (`ppo.reward.function=rlhf_exp.rewards.arithmetic:score`) and as the accuracy of an
evaluation, whatever was maximised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SUM = re.compile(r"[0-9]+(?: [+-] [0-9]+)+")
_STATED = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def result_of(prompt: str) -> int:
    """Return the result of the last sum in a prompt, such as 10 for `What is 3 + 9 - 2?`.

    Raises:
        ValueError: there is none.
    """
    sums = _SUM.findall(prompt)
    if not sums:
        raise ValueError(f"{prompt[:80]!r} asks for no sum, such as 3 + 9 - 2")
    first, *terms = re.split(r" (?=[+-])", sums[-1])
    return int(first) + sum(int(term.replace(" ", "")) for term in terms)


def stated_number(response: str) -> float | None:
    """Return the last number in a response, which counts as its answer; `None` without any."""
    numbers = _STATED.findall(response)
    return float(numbers[-1]) if numbers else None


def is_right(prompt: str, response: str) -> bool:
    """Return whether the last number in the response is the result of the prompt's sum."""
    return stated_number(response) == result_of(prompt)


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 1 for each right response and 0 for each other."""
    return [float(is_right(*pair)) for pair in zip(prompts, responses, strict=True)]
