"""What a study maximises, from the evaluations of a PPO run on validation prompts.

Each evaluation i of a run, the one before training included, has a mean reward R_i of the reward
model and a mean sequence KL K_i against the initial policy, in nats.

- *Reward at a KL budget B*: max of R_i over the evaluations with K_i <= B. KL is the price of
  reward: straying further buys more of it from a reward model, down to answers that only the reward
  model likes (Gao et al. 2023), so where beta is searched too, plain reward is best at the smallest
  beta. At equal KL, more reward is a better optimiser. Nothing is interpolated to B: the value is
  that of weights that exist, the ones that the run publishes. More evaluations come closer to B.
- *Penalised reward*: max of R_i / s - c K_i, with one c for all trials, and s the standard
  deviation of the initial policy's scores where PPO scales its rewards, else 1.
- *Final reward*: R of the last evaluation.
- *Win rate at a KL budget B*: max of W_i with K_i <= B, where W_i is the share of prompts on which
  the policy's answer beats the initial policy's, ties as half. Every prompt has one vote: a few
  answers that the reward model overrates cannot buy a high value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REWARD, KL, SPREAD = "eval/reward_mean", "eval/kl_sequence", "eval/reward_std"
WINS = "eval/win_rate"


@dataclass(frozen=True)
class Measure:
    """How a run is judged; plain values, which cross processes.

    Attributes:
        name: `reward_at_kl`, `penalised_reward`, `final_reward` or `win_rate_at_kl`.
        kl_budget: Sequence KL in nats that `reward_at_kl` and `win_rate_at_kl` allow for.
        kl_coef: Weight of the KL in `penalised_reward`.
        scaled: Whether `penalised_reward` divides rewards by their initial standard deviation.
    """

    name: str
    kl_budget: float
    kl_coef: float
    scaled: bool

    def value(self, rows: Sequence[Mapping[str, float]]) -> float:
        """Return the objective of a run so far; NaN if a number in it is not finite.

        Args:
            rows: What was logged, in the order of steps; rows without an evaluation are left out.
        """
        found = evaluations(rows)
        needed = (REWARD, KL, WINS) if self.name == "win_rate_at_kl" else (REWARD, KL)
        numbers = [row.get(name, math.nan) for row in found for name in needed]
        if not found or not all(map(math.isfinite, numbers)):
            return math.nan
        if self.name == "final_reward":
            return found[-1][REWARD]
        if self.name == "penalised_reward":
            unit = (found[0].get(SPREAD) or 1.0) if self.scaled else 1.0
            return max(row[REWARD] / unit - self.kl_coef * row[KL] for row in found)
        most = WINS if self.name == "win_rate_at_kl" else REWARD
        return max((row[most] for row in found if row[KL] <= self.kl_budget), default=-math.inf)


def evaluations(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the rows that hold an evaluation."""
    return [row for row in rows if REWARD in row and KL in row]
