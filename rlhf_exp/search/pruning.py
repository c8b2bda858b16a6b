"""Reports a trial's evaluations to its study while it trains, and asks whether to go on.

What a study maximises, from the evaluations of a PPO run on validation prompts.

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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf_exp.search.study import Pruning, open_study
from rlhf_exp.tracking.local import METRICS, STEP, read_metrics

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Trial:
    """A trial that runs; plain values, which cross processes.

    Attributes:
        study: Folder of the study.
        id: Optuna's id of the trial.
        measure: What is maximised.
        pruning: When it is given up.
    """

    study: str
    id: int
    measure: Measure
    pruning: Pruning

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the trial that `asdict` made JSON values of."""
        measure, pruning = Measure(**values["measure"]), Pruning(**values["pruning"])
        return cls(**{**values, "measure": measure, "pruning": pruning})


class PruningCallback:
    """Says whether a trial is given up.

    Args:
        trial: The trial.
        folder: Where its metrics are logged.
    """

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial, self.folder = trial, folder

    @cached_property
    def study(self) -> Study:
        """The study, opened at first use: only one process of the trial asks."""
        return open_study(Path(self.trial.study), self.trial.pruning)

    def __call__(self, step: int, steps: int) -> bool:
        """Report the run as far as it is, and return whether to give it up.

        Args:
            step: Optimizer steps done.
            steps: Of the whole run.
        """
        rows = read_metrics(self.folder / METRICS)
        report(self.study, self.trial, rows, steps)
        if step >= steps:
            return False
        return self.study.pruner.prune(self.study, self._frozen())

    def _frozen(self) -> Any:  # noqa: ANN401 - Optuna's FrozenTrial
        (found,) = [one for one in self.study.get_trials(False) if one._trial_id == self.trial.id]
        return found


def report(study: Study, trial: Trial, rows: list[dict[str, float]], steps: int) -> None:
    """Report every evaluation so far, those before a restart included.

    The value at each is the objective of the run up to it. Their places are parts of the whole run,
    so that trials with iterations of other lengths are compared when they are equally far.

    Args:
        study: The study.
        trial: The trial.
        rows: What was logged, by step.
        steps: Optimizer steps of the whole run.
    """
    storage, found = study._storage, evaluations(rows)
    known = storage.get_trial(trial.id).intermediate_values
    for number, row in enumerate(found, start=1):
        place = int(row[STEP] / steps * trial.pruning.evaluations + 0.5)
        value = trial.measure.value(found[:number])
        if known.get(place) != value:
            storage.set_trial_intermediate_value(trial.id, place, value)


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
