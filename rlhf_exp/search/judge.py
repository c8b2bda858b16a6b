"""Reports a trial's evaluations to its study while it trains, and asks whether to go on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf_exp.evaluation.objective import Measure, evaluations
from rlhf_exp.search.journal import Pruning, open_study
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


class Judge:
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
