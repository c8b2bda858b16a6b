"""A reward of your own: short answers that end like a sentence.

Use it with `ppo.reward.function=examples/my_reward.py:score`. PPO calls `score` with lists of texts
and wants one finite number for each response; higher is better.
"""

from __future__ import annotations

LONGEST = 20  # words


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1 for an ended answer of at most 20 words, less for any other."""
    return [_score(response) for response in responses]


def _score(response: str) -> float:
    words = len(response.split())
    if words == 0:
        return -1.0
    ended = 1.0 if response.endswith((".", "!", "?")) else 0.0
    too_long = max(0, words - LONGEST) / LONGEST
    return ended - too_long
