"""Studies of small runs, with a stage instead of PPO that only logs what a formula says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from optuna.trial import FrozenTrial

from rlhf_exp.config.experiment import Config
from rlhf_exp.launchers.optuna.trial import study_folder
from rlhf_exp.launchers.optuna.worker import run_worker
from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.search.study import open_study
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.store.run_records import RunRecord
from tests.lab import small_config

NAME = "tpe"
LR = "{key:ppo.lr,low:1e-6,high:1e-1,log:true}"
Fate = Callable[[float, int], None]


def reward(lr: float, part: float) -> float:
    """Return a reward that is best at a learning rate of 1e-3, after a part of the run."""
    return (1.0 - 0.1 * math.log10(lr / 1e-3) ** 2) * part


class Stand:
    """Stands in for the PPO stage.

    Attributes:
        fate: Called with the learning rate and the step before each evaluation; may raise.
        broken: Learning rates whose reward is no number.
        ran: The learning rates that were trained.
        from_steps: The step at which each of them began.
    """

    def __init__(self) -> None:
        self.fate: Fate = lambda lr, step: None
        self.broken: list[float] = []
        self.ran: list[float] = []
        self.from_steps: list[int] = []

    def run(self, config: Config, context: StageContext) -> StageResult:
        lr, steps, every = config.ppo.lr, config.ppo.steps, config.ppo.eval_every
        log = context.folder / "metrics.jsonl"
        done = len(log.read_text().splitlines()) if log.exists() else 0
        self.ran.append(lr)
        self.from_steps.append(done * every)
        for step in range(done * every, steps + 1, every):
            self.fate(lr, step)
            found = math.nan if lr in self.broken else reward(lr, step / steps)
            row = {"global_step": step, "eval/reward_mean": found, "eval/kl_sequence": 1.0}
            with log.open("a") as file:
                file.write(json.dumps(row).replace("NaN", '"NaN"') + "\n")
            if context.given_up is not None and context.given_up(step, steps):
                return StageResult({}, pruned_step=step)
        (context.folder / "model").mkdir()
        (context.folder / "model" / "model.safetensors").write_text(str(lr))
        return StageResult({"eval/reward_mean": reward(lr, 1.0)}, objective=reward(lr, 1.0))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Puts a stand-in in the place of the PPO stage."""
    import rlhf_exp.stages.ppo as ppo

    assert isinstance(sys.modules["rlhf_exp.stages.ppo"], ModuleType)
    found = Stand()
    monkeypatch.setattr(ppo, "run", found.run)
    return found


def study_config(folder: Path, trials: int, *overrides: str) -> Config:
    """Return the config of a study over the learning rate; 6 steps, evaluated at 0, 2, 4 and 6."""
    return small_config(
        folder,
        "stage=ppo",
        f"name={NAME}",
        f"study.trials={trials}",
        f"study.space=[{LR}]",
        "study.startup=3",
        "study.pruner=none",
        *overrides,
    )


def run_study(folder: Path, trials: int, *overrides: str) -> float | None:
    """Run a worker of a study."""
    return run_worker(study_config(folder, trials, *overrides), ["study"])


def trials_of(folder: Path) -> list[FrozenTrial]:
    return open_study(study_folder(folder, NAME)).get_trials()


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in trials_of(folder)]


def records(folder: Path) -> dict[str, RunRecord]:
    """Return the records of the trials by key."""
    found = records_of(study_config(folder, 1)).sweep(NAME)
    return {record.key: record for record in found}
