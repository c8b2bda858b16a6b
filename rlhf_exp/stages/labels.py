"""What answers that no model under evaluation gave as it is are called in `samples.jsonl`."""

from __future__ import annotations

CHOSEN, REJECTED, BLANK = "chosen", "rejected", "blank"
"""Sides of held-out pairs: what people chose, what they did not, and an answer of no words."""


def pairs_part(part: str) -> str:
    """Return the name under which a part's held-out pairs are kept."""
    return f"{part}/pairs"


def at_step(name: str, step: int | str) -> str:
    """Return the name of a model at another step of its training."""
    return f"{name}, step {step}"
