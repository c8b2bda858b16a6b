"""A stand-in for PPO: a noisy quadratic in the logarithm of a learning rate, seven evaluations."""

from __future__ import annotations

import math
import random
from pathlib import Path

from optuna.distributions import FloatDistribution, IntDistribution

from rlhf_exp.search.pruning import RunningTrial, TrialObjective, report_evaluations
from rlhf_exp.search.study import Pruning, Search, SearchSettings, TrialHandle
from rlhf_exp.store.store import Store

BEST = 1e-4
STEPS = 6
OBJECTIVE = TrialObjective("reward_at_kl", kl_budget=5.0, kl_coef=0.05, scaled=False)
SPACE = {"ppo.lr": FloatDistribution(1e-6, 1e-2, log=True), "ppo.epochs": IntDistribution(1, 8)}


def search(folder: Path, trials: int, rule: str = "none", worker: int = 0, seed: int = 0) -> Search:
    """Open the study in a folder."""
    settings = SearchSettings(trials, SPACE, {"ppo.lr": 1e-3, "ppo.epochs": 4}, 4, 1, seed)
    pruning = Pruning(rule, after=2, warmup=1, evaluations=STEPS)
    return Search(folder / "study", Store(folder / "store"), "lab", settings, pruning, worker)


def reward(values: dict[str, float], step: int) -> float:
    """Return the stand-in's reward: it rises to a height that depends on the learning rate."""
    distance = math.log10(values["ppo.lr"] / BEST)
    noise = random.Random(f"{values} {step}").gauss(0.0, 0.01)
    return (1.0 - 0.25 * distance**2) * step / STEPS + noise


def rows(values: dict[str, float], last: int = STEPS) -> list[dict[str, float]]:
    """Return what a run logs up to a step; KL is the step, so that 5 of 6 are within the budget."""
    return [
        {"global_step": step, "eval/reward_mean": reward(values, step), "eval/kl_sequence": step}
        for step in range(last + 1)
    ]


def play(study: Search, asked: TrialHandle) -> str:
    """Run a trial as a worker does; return how it ended."""
    folder = study.study._storage._backend._file_path
    trial = RunningTrial(
        str(Path(folder).parent), asked.id, OBJECTIVE, Pruning("median", 2, 1, STEPS)
    )
    for step in range(STEPS + 1):
        report_evaluations(study.study, trial, rows(asked.values, step), STEPS)
        if step < STEPS and study.study.pruner.prune(study.study, study.frozen(asked.id)):
            asked.prune()
            return "pruned"
    asked.complete(OBJECTIVE.value(rows(asked.values)))
    return "complete"


def play_all(study: Search) -> int:
    """Run trials until there are as many as wanted; return how many this worker has run."""
    count = 0
    while True:
        with study.ask() as asked:
            if asked is None:
                return count
            play(study, asked)
            count += 1
