"""What N judged pairs say about which model is preferred: one summary for any judge.

What it leaves out: who judged. Several people's votes on a prompt become one sign and one value for
it first (`agreement.majority`, `agreement.mean_value`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike

from rlhf_exp.evaluation.statistics import (
    LEVEL,
    Estimate,
    Interval,
    Outcome,
    clopper_pearson,
    count_outcomes,
    estimate_mean,
    sign_test,
)

POWER = 0.8
ALPHA = 0.05
# Beyond this many decided pairs an effect is called too small to plan for.
MOST_PAIRS = 20_000


@dataclass(frozen=True)
class Preference:
    """Model b compared with the baseline a.

    Attributes:
        outcome: prompts on which b won, tied and lost.
        p_value: of the exact two-sided sign test, ties left out.
        win_rate: exact interval (Clopper-Pearson) of the share of wins among decided prompts.
        ties_as_half: share of wins with a tie as half of one, and its bootstrap interval over
            prompts; `None` without prompts.
    """

    outcome: Outcome
    p_value: float
    win_rate: Interval
    ties_as_half: Estimate | None

    @cached_property
    def needed(self) -> int | None:
        """Decided prompts that a new study needs, if the win rate is the one found.

        With so many the sign test finds it with probability `POWER` at level `ALPHA`. `None` if
        more than `MOST_PAIRS`, or nothing was decided. Computed when it is asked for: near one half
        thousands of sums are tried.
        """
        return needed_pairs(self.outcome.win_rate) if self.outcome.decided else None

    @property
    def needed_prompts(self) -> int | None:
        """`needed` with the share of ties that was found: prompts, decided or not."""
        if self.needed is None:
            return None
        return math.ceil(self.needed * self.outcome.total / self.outcome.decided)


def preference(
    signs: ArrayLike, values: ArrayLike | None = None, seed: int = 0, level: float = LEVEL
) -> Preference:
    """Summarise N judged prompts.

    Args:
        signs: [N]: 1 where b is preferred, 0 for a tie, -1 where a is.
        values: [N] from 0 (a preferred) to 1 (b preferred), the mean over a prompt's votes; by
            default what the signs say.
        seed: of the bootstrap.
        level: of the intervals.
    """
    decided = np.asarray(signs, dtype=np.int64)
    outcome = count_outcomes(decided)
    shares = (decided + 1) / 2 if values is None else np.asarray(values, dtype=np.float64)
    return Preference(
        outcome=outcome,
        p_value=sign_test(outcome.wins, outcome.losses),
        win_rate=clopper_pearson(outcome.wins, outcome.decided, level),
        ties_as_half=estimate_mean(shares, seed, level) if len(shares) else None,
    )


def sign_test_power(count: int, win_rate: float, alpha: float = ALPHA) -> float:
    """Return the probability that the exact two-sided sign test rejects.

    Args:
        count: decided pairs.
        win_rate: the true probability of a win among them.
        alpha: level of the test.
    """
    # Largest number of losses (or wins) that is rejected; the fair coin makes both tails equal.
    edge = int(scipy.stats.binom.ppf(alpha / 2, count, 0.5))
    if scipy.stats.binom.cdf(edge, count, 0.5) > alpha / 2:
        edge -= 1
    if edge < 0:
        return 0.0
    low = scipy.stats.binom.cdf(edge, count, win_rate)
    high = scipy.stats.binom.sf(count - edge - 1, count, win_rate)
    return float(low + high)


def needed_pairs(win_rate: float, power: float = POWER, alpha: float = ALPHA) -> int | None:
    """Return the smallest number of decided pairs at which the sign test has this power.

    The power of an exact test does not rise with every pair, so a few numbers above the smallest
    can lie a little below `power` again.

    Args:
        win_rate: the true probability of a win among decided pairs.
        power: the probability to find it.
        alpha: level of the test.

    Returns:
        The number; `None` if it is above `MOST_PAIRS`.
    """
    effect = abs(win_rate - 0.5)
    if effect == 0:
        return None
    # The normal approximation overestimates the exact test's power: start well below it.
    spread = scipy.stats.norm.ppf(1 - alpha / 2) * 0.5
    spread += scipy.stats.norm.ppf(power) * math.sqrt(win_rate * (1 - win_rate))
    start = int(0.8 * (spread / effect) ** 2)
    if start > MOST_PAIRS:
        return None
    for count in range(max(1, start), MOST_PAIRS + 1):
        if sign_test_power(count, win_rate, alpha) >= power:
            return count
    return None
