"""Rules for `study`: what may be searched, and whether every corner of it can be run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter

from rlhf_exp.config.fields import in_key
from rlhf_exp.config.keys import all_keys, closest_keys, did_you_mean
from rlhf_exp.config.problems import Findings, Problem, written
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.space import ends, settled, settled_space, whole
from rlhf_exp.config.study import Axis, Objective
from rlhf_exp.config.trial import trial_config

Check = Callable[[Config], list[Problem]]
_CORNERS = 256
# Another value of these would change what is measured, or how much a trial may cost.
_MEASURING = {
    "ppo.seed": "a seed is not to be searched; ppo.seed=N sets that of all trials",
    "ppo.steps": "it is what all trials have in common; see study.length",
    "ppo.eval_prompts": "it would change the objective",
    "ppo.eval_every": "it would change the objective",
    "ppo.seq_length": "it would change the objective",
    "ppo.kl.budget": "study.kl_budget is the same for all trials",
    "ppo.kl.select_coef": "study.kl_coef is the same for all trials",
}


def check_study(found: Findings, check: Check) -> None:
    """Report what is wrong with a study.

    Args:
        found: Collects the problems.
        check: Returns what is wrong with the config of a trial.
    """
    config, study = found.config, found.config.study
    found.at_least(1, "study.trials", "study.workers", "study.startup", "study.max_failures")
    found.at_least(0, "study.worker", "study.seed", "study.prune_after", "study.warmup")
    found.at_least(0, "study.finalists", "study.kl_coef")
    if study.objective in (Objective.reward_at_kl, Objective.win_rate_at_kl):
        found.positive("study.kl_budget")
    stages = (Stage.ppo, Stage.eval, Stage.pipeline)
    found.unless(config.stage in stages, "stage", "a study is of PPO: use stage=ppo, or none.")
    found.unless(config.ppo.use is None, "ppo.use", "a study trains PPO; leave it out.")
    found.unless(not config.probe, "probe", "a study cannot be probed; leave sweep and study out.")
    if find_spec("optuna") is None:
        found.add("study.trials", "needs Optuna; run `pip install 'rlhf-exp[sweeps]'`.")
    found.unless(bool(study.space), "study.space", "is empty; sweep=ppo_optuna has a usual one.")
    keys = [axis.key for axis in study.space]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        found.problems.append(Problem("study.space", key, "is there twice."))
    wrong = [
        Problem(f"study.space: {axis.key}", _shown(axis), message)
        for axis in study.space
        if (message := _key_problem(axis.key) or _range_problem(axis, config)) is not None
    ]
    found.problems += wrong
    if study.space and not found.problems:
        found.problems += _corner_problems(config, check)


def _key_problem(key: str) -> str | None:
    known = all_keys().get(key)
    if known is None:
        return f"there is no such key.{did_you_mean(closest_keys(key))}"
    if not key.startswith("ppo."):
        return "only keys of PPO are searched: data and reward model stay the same in a study."
    if key in _MEASURING:
        return f"{_MEASURING[key]}."
    if key.startswith("ppo.generation."):
        return "how answers are sampled would change the objective."
    if not known.type.startswith(("number", "integer")):
        return f"only numbers are searched; this is {known.type}."
    if not in_key(known.item):
        return "it does not change the result."
    return None


def _range_problem(axis: Axis, config: Config) -> str | None:
    if axis.around is not None:
        if axis.choices is not None or axis.low is not None or axis.high is not None:
            return "give one of choices, around, or low and high."
        if not axis.around > 1:
            return "around must be above 1."
        if not attrgetter(axis.key)(config):
            return "there is nothing around 0 or null: give low and high."
        axis = settled(axis, config)
    bounds = [axis.low, axis.high]
    if axis.choices is not None:
        if not axis.choices or any(value is not None for value in (*bounds, axis.step)) or axis.log:
            return "give one of choices, around, or low and high."
        if len(set(axis.choices)) != len(axis.choices):
            return "a choice is there twice."
        return _fraction(axis, axis.choices)
    if axis.low is None or axis.high is None:
        return "needs low and high, or choices."
    if not axis.low < axis.high < float("inf"):
        return "low must be below high."
    if axis.log and axis.low <= 0:
        return "a logarithmic scale needs low above 0."
    if axis.log and axis.step is not None:
        return "a logarithmic scale has no step."
    if axis.step is not None and not 0 < axis.step <= axis.high - axis.low:
        return "step must be above 0, and not more than high - low."
    return _fraction(axis, [axis.low, axis.high, axis.step or 1])


def _fraction(axis: Axis, values: list[float]) -> str | None:
    broken = [value for value in values if value != int(value)] if whole(axis) else []
    return f"takes whole numbers, and {broken[0]:g} is none." if broken else None


def _corner_problems(config: Config, check: Check) -> Iterator[Problem]:
    """Yield what is wrong with trials at the corners of the space, each thing once."""
    axes = settled_space(config)
    told: set[str] = set()
    corners = itertools.product(*([(axis.key, end) for end in ends(axis)] for axis in axes))
    for corner in itertools.islice(corners, _CORNERS):
        for problem in check(trial_config(config, dict(corner))):
            if problem.message not in told:
                told.add(problem.message)
                point = ", ".join(f"{key}={value:g}" for key, value in corner)
                yield replace(
                    problem, message=f"{problem.message} (a trial of study.space: {point})"
                )


def _shown(axis: Axis) -> str:
    if axis.choices is not None:
        return written(axis.choices)
    if axis.around is not None:
        return f"around by {written(axis.around)}"
    parts = [f"{written(axis.low)} to {written(axis.high)}", "log" if axis.log else ""]
    return ", ".join(part for part in parts if part)
