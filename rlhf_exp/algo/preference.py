"""Wins and ties between scored answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIE_BAND = (0.4, 0.6)
"""Preference probabilities that count as a tie, both ends included."""


def wins(scores: Tensor, baseline: Tensor) -> Tensor:
    """Return 1 where an answer beats the baseline's, 0.5 for a tie, 0 where it loses.

    The probability of being preferred is Bradley and Terry's (1952), which the reward model's
    pairwise loss fits.

    Args:
        scores: [N] of the answers.
        baseline: [N] scores of the baseline's answers to the same prompts.

    Returns:
        [N] float64.
    """
    probability = (scores.double() - baseline.double()).sigmoid()
    low, high = TIE_BAND
    return 0.5 + 0.5 * (probability > high).double() - 0.5 * (probability < low).double()
