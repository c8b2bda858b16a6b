"""Objective and pruning of a search: evaluations of a running trial, reported to its study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf_exp.algo.rounding import divisor
from rlhf_exp.search.study import Pruning, open_study
from rlhf_exp.tracking.local import METRICS, STEP, read_metrics

if TYPE_CHECKING:
    from optuna import Study

REWARD, KL, REWARD_STD = "eval/reward_mean", "eval/kl_sequence", "eval/reward_std"
WIN_RATE = "eval/win_rate"


@dataclass(frozen=True)
class TrialObjective:
    """The objective that a study maximises, from a PPO run's evaluations on validation prompts.

    Each evaluation i of a run, the one before training included, has a mean reward R_i of the
    reward model and a mean sequence KL K_i against the initial policy, in nats.

    - *Reward at a KL budget B*: max of R_i over the evaluations with K_i <= B. KL is the price of
      reward: straying further buys more of it from a reward model, down to answers that only the
      reward model likes (Gao et al. 2023), so where beta is searched too, plain reward is best at
      the smallest beta. At equal KL, more reward is a better optimiser. Nothing is interpolated to
      B: the value is that of weights that exist, the ones that the run publishes. More evaluations
      come closer to B.
    - *Penalised reward*: max of R_i / s - c K_i, with one c for all trials, and s the standard
      deviation of the initial policy's scores where PPO scales its rewards, else 1.
    - *Final reward*: R of the last evaluation.
    - *Win rate at a KL budget B*: max of W_i with K_i <= B, where W_i is the share of prompts on
      which the policy's answer beats the initial policy's, ties as half. Every prompt has one vote:
      a few answers that the reward model overrates cannot buy a high value.

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
            rows: The logged metrics, in order of steps; rows without an evaluation are ignored.
        """
        measured = evaluation_rows(rows)
        needed = (REWARD, KL, WIN_RATE) if self.name == "win_rate_at_kl" else (REWARD, KL)
        numbers = [row.get(name, math.nan) for row in measured for name in needed]
        if not measured or not all(map(math.isfinite, numbers)):
            return math.nan
        if self.name == "final_reward":
            return measured[-1][REWARD]
        if self.name == "penalised_reward":
            first = measured[0]
            deviation = first.get(REWARD_STD, 0.0) if self.scaled else 0.0
            unit = divisor(deviation, abs(first[REWARD]))
            return max(row[REWARD] / unit - self.kl_coef * row[KL] for row in measured)
        maximised = WIN_RATE if self.name == "win_rate_at_kl" else REWARD
        return max(
            (row[maximised] for row in measured if row[KL] <= self.kl_budget), default=-math.inf
        )


def evaluation_rows(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the rows that hold an evaluation."""
    return [row for row in rows if REWARD in row and KL in row]


@dataclass(frozen=True)
class RunningTrial:
    """A trial of a study while it runs, as plain values that can be sent to other processes.

    Attributes:
        study: Folder of the study.
        id: Optuna's id of the trial.
        objective: The objective that the study maximises.
        pruning: The rule by which trials are pruned.
    """

    study: str
    id: int
    objective: TrialObjective
    pruning: Pruning

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the trial that `asdict` turned into JSON values."""
        objective, pruning = TrialObjective(**values["objective"]), Pruning(**values["pruning"])
        return cls(**{**values, "objective": objective, "pruning": pruning})


class PruningCallback:
    """Reports a trial's evaluations to its study while it trains, and decides whether to prune it.

    Args:
        trial: The trial.
        folder: The folder of its metrics.
    """

    def __init__(self, trial: RunningTrial, folder: Path) -> None:
        self.trial, self.folder = trial, folder

    @cached_property
    def study(self) -> Study:
        """The study, opened at first use: only one process of the trial needs it."""
        return open_study(Path(self.trial.study), self.trial.pruning)

    def __call__(self, step: int, steps: int) -> bool:
        """Report the run's evaluations so far, and return whether to prune it.

        Args:
            step: Optimizer steps done.
            steps: Optimizer steps of the whole run.
        """
        rows = read_metrics(self.folder / METRICS)
        report_evaluations(self.study, self.trial, rows, steps)
        if step >= steps:
            return False
        return self.study.pruner.prune(self.study, self._frozen())

    def _frozen(self) -> Any:  # noqa: ANN401 - Optuna's FrozenTrial
        trials = self.study.get_trials(deepcopy=False)
        return next(trial for trial in trials if trial._trial_id == self.trial.id)


def report_evaluations(
    study: Study, trial: RunningTrial, rows: list[dict[str, float]], steps: int
) -> None:
    """Report the objective at every evaluation so far, those before a restart included.

    The value at an evaluation is the objective of the run up to it. Its Optuna step is its fraction
    of the whole run, in numbers of evaluations, so that trials with other iteration lengths are
    compared at equal fractions.

    Args:
        study: The study.
        trial: The trial.
        rows: The logged metrics, in order of steps.
        steps: Optimizer steps of the whole run.
    """
    storage, measured = study._storage, evaluation_rows(rows)
    known = storage.get_trial(trial.id).intermediate_values
    for number, row in enumerate(measured, start=1):
        at = int(row[STEP] / steps * trial.pruning.evaluations + 0.5)
        value = trial.objective.value(measured[:number])
        if known.get(at) != value:
            storage.set_trial_intermediate_value(trial.id, at, value)
