"""Which prompts a qualitative table shows: by a stated rule, never by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

GAIN = "largest gain"
LOSS = "largest loss"
RANDOM = "random"


@dataclass(frozen=True)
class Pick:
    """One prompt chosen for the table.

    Attributes:
        rule: `GAIN`, `LOSS` or `RANDOM`.
        row: the prompt's number in the comparison.
    """

    rule: str
    row: int


def pick_samples(difference: ArrayLike, seed: int, each: int = 3) -> list[Pick]:
    """Choose prompts for the side-by-side table; `sample_rule` says the rule in words.

    Args:
        difference: [N] reward of b minus reward of a; equal ones go by row number.
        seed: of the random third.
        each: at most this many of each kind.

    Returns:
        Gains (largest first), losses (largest first), random ones (by row); no row twice.
    """
    gains = np.asarray(difference, dtype=np.float64)
    order = np.argsort(-gains, kind="stable")
    best = [int(row) for row in order if gains[row] > 0][:each]
    ascending = np.argsort(gains, kind="stable")
    worst = [int(row) for row in ascending if gains[row] < 0][:each]
    rest = np.setdiff1d(np.arange(len(gains)), [*best, *worst])
    drawn = np.random.default_rng(seed).permutation(rest)[:each]
    return [
        *(Pick(GAIN, row) for row in best),
        *(Pick(LOSS, row) for row in worst),
        *(Pick(RANDOM, int(row)) for row in sorted(drawn)),
    ]


def sample_rule(each: int, seed: int) -> str:
    """Return the rule of `pick_samples` in words."""
    return (
        f"Chosen by rule: the {each} largest gains in reward, the {each} largest losses, "
        f"and {each} of the remaining prompts at random (seed {seed})."
    )
