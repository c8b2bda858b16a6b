"""From the command line of a study to that of its workers, and to that of a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_exp.config.compose import Composed
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.space import space_override, with_space

# Of the study, or of no interest to a trial that is run by itself.
_NOT_OF_TRIALS = ("study", "sweep", "hydra", "name", "plan", "cache", "rerun")


def worker_overrides(
    overrides: Sequence[str], base: Composed, groups: Mapping[str, object], multirun: bool
) -> tuple[list[str], list[Problem]]:
    """Return the command line of a study's workers, and what is wrong with it.

    Args:
        overrides: As typed; sweeps are what is searched.
        base: Composed from what is not swept.
        groups: The config groups by name.
        multirun: Whether a multirun was asked for.
    """
    kept, space, found = with_space(overrides, base.config.study.space, groups)
    trials = str(base.config.study.trials)
    if not multirun:
        found.append(Problem("study.trials", trials, "a study is a multirun: add -m."))
    for text in base.sweep:
        key, _, value = text.partition("=")
        message = "with a study, hydra.sweeper.params has no effect; write it into study.space."
        found.append(Problem(f"hydra.sweeper.params.{key}", value, message))
    changed = space != base.config.study.space
    return [*kept, *([space_override(space)] if changed else [])], found


def of_workers(workers: int, here: bool) -> list[str]:
    """Return the overrides that make a job of each worker, all at the same time.

    Args:
        workers: How many.
        here: Whether they run on this machine.
    """
    jobs = [f"hydra.launcher.n_jobs={workers}"] if here else []
    return [f"study.worker={','.join(map(str, range(workers)))}", *jobs]


def of_a_trial(overrides: Sequence[str]) -> list[str]:
    """Return those of a worker's overrides that a trial needs when it is run by itself."""
    return [
        text
        for text in overrides
        if text.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".").split(".")[0]
        not in _NOT_OF_TRIALS
    ]
