"""The search space of a study: its axes, its trials' configs, its checks and its command lines.

A study searches PPO's hyperparameters. Its axes (`study.space`) come from YAML or from Hydra's
sweep syntax on the command line. A trial is one point of the space: the study's config with other
values under `ppo`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)

from rlhf_exp.config.compose import ComposedConfig
from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.fields import in_key
from rlhf_exp.config.overrides import parse_override
from rlhf_exp.config.problems import ConfigChecker, Problem, format_value
from rlhf_exp.config.schema_keys import all_keys, closest_keys, did_you_mean
from rlhf_exp.config.study import Axis, Length, Objective, StudyConfig
from rlhf_exp.config.text_values import override_of
from rlhf_exp.config.training import PpoConfig, Select, SelectBy

TrialValues = Mapping[str, float]
TrialChecker = Callable[[Config], list[Problem]]
_MAX_EXTREME_TRIALS = 256
# Searching these would change the objective or the cost of a trial.
_FIXED_IN_STUDY = {
    "ppo.seed": "a seed is not to be searched; ppo.seed=N sets that of all trials",
    "ppo.steps": "it is what all trials have in common; see study.length",
    "ppo.eval_prompts": "it would change the objective",
    "ppo.eval_every": "it would change the objective",
    "ppo.seq_length": "it would change the objective",
    "ppo.kl.budget": "study.kl_budget is the same for all trials",
    "ppo.kl.select_coef": "study.kl_coef is the same for all trials",
}
# A trial that is run by itself has a name, place and stage of its own.
_NOT_COMPARED = ("study", "stage", "eval", "name", "output_dir", "plan", "cache", "rerun")
# A trial that is run by itself does not need these.
_STUDY_ONLY = ("study", "sweep", "hydra", "name", "plan", "cache", "rerun")


def bounded_space(config: Config) -> list[Axis]:
    """Return the axes of a study, all with explicit bounds."""
    return [with_bounds(axis, config) for axis in config.study.space]


def with_bounds(axis: Axis, config: Config) -> Axis:
    """Return an axis with explicit bounds instead of `around`, a factor of the config's value."""
    value = attrgetter(axis.key)(config)
    if axis.around is None or not value or axis.around <= 1:
        return axis
    low, high = value / axis.around, value * axis.around
    if axis.step:
        low, high = math.ceil(low / axis.step) * axis.step, high // axis.step * axis.step
    elif is_integer(axis):
        low, high = max(1, round(low)), round(high)
    else:
        low, high = float(f"{low:.4g}"), float(f"{high:.4g}")
    return replace(axis, low=low, high=high, log=not axis.step, around=None)


def axis_bounds(axis: Axis) -> list[float]:
    """Return the smallest and the largest value of an axis with bounds, as int or float."""
    values = axis.choices or [axis.low or 0.0, axis.high or 0.0]
    number_type = int if is_integer(axis) else float
    return [number_type(min(values)), number_type(max(values))]


def is_integer(axis: Axis) -> bool:
    """Return whether an axis takes whole numbers only."""
    return all_keys()[axis.key].type.startswith("integer")


def base_values(config: Config) -> dict[str, float]:
    """Return the config's own value of every searched key."""
    return {axis.key: attrgetter(axis.key)(config) for axis in config.study.space}


def trial_config(config: Config, values: TrialValues) -> Config:
    """Return the config of one trial: PPO with chosen values, selecting weights by the objective.

    With `study.length=responses` it samples as many responses as the config would, rounded to whole
    iterations, and is evaluated as often: trials cost alike and compare at each evaluation.

    Args:
        config: The study's config.
        values: The searched values by dotted key.
    """
    study, base = config.study, config.ppo
    ppo: PpoConfig = with_values(config, values).ppo
    if study.length is Length.responses:
        iterations = max(1, round(base.iterations * base.rollouts / ppo.rollouts))
        steps = iterations * ppo.updates
        scaled = {
            name: max(1, round(steps * getattr(base, name) / base.steps))
            for name in ("eval_every", "checkpoint_every", "warmup_steps")
            if getattr(base, name)
        }
        ppo = replace(ppo, steps=steps, **scaled)
    by_win_rate = study.objective is Objective.win_rate_at_kl
    ppo = replace(ppo, select_by=SelectBy.win_rate if by_win_rate else SelectBy.reward)
    if study.objective is Objective.final_reward:
        ppo = replace(ppo, select=Select.last)
    elif study.objective is Objective.penalised_reward:
        ppo = replace(ppo, select=Select.best, kl=replace(ppo.kl, select_coef=study.kl_coef))
    else:
        ppo = replace(ppo, select=Select.best, kl=replace(ppo.kl, budget=study.kl_budget))
    return replace(
        config,
        stage=StageName.ppo,
        eval=replace(config.eval, suite=Suite.none),
        ppo=ppo,
        study=StudyConfig(),
    )


def with_values(section: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any section
    """Return a config section with other values at some dotted keys."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        new_value = with_values(getattr(section, name), {rest: value}) if rest else value
        section = replace(section, **{name: new_value})
    return section


def check_study(check: ConfigChecker, trial_problems: TrialChecker) -> None:
    """Report the problems of a study.

    Args:
        check: The config, and the problems found in it.
        trial_problems: Returns the problems of a trial's config.
    """
    config, study = check.config, check.config.study
    check.at_least(1, "study.trials", "study.workers", "study.startup", "study.max_failures")
    check.at_least(0, "study.worker", "study.seed", "study.prune_after", "study.warmup")
    check.at_least(0, "study.finalists", "study.kl_coef")
    if study.objective in (Objective.reward_at_kl, Objective.win_rate_at_kl):
        check.positive("study.kl_budget")
    stages = (StageName.ppo, StageName.eval, StageName.pipeline)
    check.require(config.stage in stages, "stage", "a study is of PPO: use stage=ppo, or none.")
    check.require(config.ppo.use is None, "ppo.use", "a study trains PPO; leave it out.")
    check.require(not config.probe, "probe", "a study cannot be probed; leave sweep and study out.")
    if find_spec("optuna") is None:
        check.add("study.trials", "needs Optuna: `pip install optuna` (extra `sweeps`).")
    check.require(bool(study.space), "study.space", "is empty; sweep=ppo_optuna has a usual one.")
    keys = [axis.key for axis in study.space]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        check.problems.append(Problem("study.space", key, "is there twice."))
    axis_problems = [
        Problem(f"study.space: {axis.key}", _describe_axis(axis), message)
        for axis in study.space
        if (message := _key_problem(axis.key) or _range_problem(axis, config)) is not None
    ]
    check.problems += axis_problems
    if study.space and not check.problems:
        check.problems += _extreme_trial_problems(config, trial_problems)


def _key_problem(key: str) -> str | None:
    config_key = all_keys().get(key)
    if config_key is None:
        return f"there is no such key.{did_you_mean(closest_keys(key))}"
    if not key.startswith("ppo."):
        return "only keys of PPO are searched: data and reward model stay the same in a study."
    if key in _FIXED_IN_STUDY:
        return f"{_FIXED_IN_STUDY[key]}."
    if key.startswith("ppo.generation."):
        return "how answers are sampled would change the objective."
    if not config_key.type.startswith(("number", "integer")):
        return f"only numbers are searched; this is {config_key.type}."
    if not in_key(config_key.field):
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
        axis = with_bounds(axis, config)
    bounds = [axis.low, axis.high]
    if axis.choices is not None:
        if not axis.choices or any(value is not None for value in (*bounds, axis.step)) or axis.log:
            return "give one of choices, around, or low and high."
        if len(set(axis.choices)) != len(axis.choices):
            return "a choice is there twice."
        return _integer_problem(axis, axis.choices)
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
    return _integer_problem(axis, [axis.low, axis.high, axis.step or 1])


def _integer_problem(axis: Axis, values: list[float]) -> str | None:
    fractions = [value for value in values if value != int(value)] if is_integer(axis) else []
    return f"takes whole numbers, and {fractions[0]:g} is none." if fractions else None


def _describe_axis(axis: Axis) -> str:
    if axis.choices is not None:
        return format_value(axis.choices)
    if axis.around is not None:
        return f"around by {format_value(axis.around)}"
    parts = [f"{format_value(axis.low)} to {format_value(axis.high)}", "log" if axis.log else ""]
    return ", ".join(part for part in parts if part)


def _extreme_trial_problems(config: Config, trial_problems: TrialChecker) -> Iterator[Problem]:
    """Yield the problems of trials with all values at their bounds, each once."""
    space = bounded_space(config)
    reported: set[str] = set()
    extremes = itertools.product(
        *([(axis.key, bound) for bound in axis_bounds(axis)] for axis in space)
    )
    for values in itertools.islice(extremes, _MAX_EXTREME_TRIALS):
        for problem in trial_problems(trial_config(config, dict(values))):
            if problem.message not in reported:
                reported.add(problem.message)
                assignments = ", ".join(f"{key}={value:g}" for key, value in values)
                yield replace(
                    problem, message=f"{problem.message} (a trial of study.space: {assignments})"
                )


def worker_overrides(
    overrides: Sequence[str], base: ComposedConfig, groups: Mapping[str, object], multirun: bool
) -> tuple[list[str], list[Problem]]:
    """Return the command line of a study's workers, and its problems.

    Args:
        overrides: As typed; sweeps say what is searched.
        base: Composed from the overrides that are not swept.
        groups: The config groups by name.
        multirun: Whether a multirun was asked for.
    """
    fixed, space, problems = extract_space(overrides, base.config.study.space, groups)
    trials = str(base.config.study.trials)
    if not multirun:
        problems.append(Problem("study.trials", trials, "a study is a multirun: add -m."))
    for text in base.sweep:
        key, _, value = text.partition("=")
        message = "with a study, hydra.sweeper.params has no effect; write it into study.space."
        problems.append(Problem(f"hydra.sweeper.params.{key}", value, message))
    changed = space != base.config.study.space
    return [*fixed, *([space_override(space)] if changed else [])], problems


def extract_space(
    overrides: Sequence[str], space: Sequence[Axis], groups: Mapping[str, object]
) -> tuple[list[str], list[Axis], list[Problem]]:
    """Separate the overrides that search a key from those that fix one.

    A key's `interval`, `range` or list of values replaces its axis in the space. A key with a plain
    value is fixed, and leaves the space.

    Args:
        overrides: As on the command line.
        space: The axes in the config files.
        groups: The config groups by name.

    Returns:
        The overrides without sweeps, the resulting space, and the problems.
    """
    axes, fixed, problems = {axis.key: axis for axis in space}, [], []
    for text in overrides:
        override = parse_override(text)
        if isinstance(override, Problem):
            problems.append(override)
        elif not override.is_sweep_override():
            axes.pop(override.key_or_group, None)
            fixed.append(text)
        elif override.key_or_group in groups or override.key_or_group.startswith("hydra"):
            message = "a study has one config: choose one, and start a study for each."
            problems.append(Problem(override.key_or_group, text.partition("=")[2], message))
        else:
            axis = _axis_of_sweep(override)
            if isinstance(axis, Problem):
                problems.append(axis)
            else:
                axes[axis.key] = axis
    return fixed, list(axes.values()), problems


def _axis_of_sweep(override: Override) -> Axis | Problem:
    key, value = override.key_or_group, override.value()
    written_value = (override.input_line or "").partition("=")[2]
    log = "log" in (getattr(value, "tags", None) or ())
    if isinstance(value, IntervalSweep):
        return Axis(key, float(value.start or 0), float(value.end or 0), log)
    if isinstance(value, RangeSweep):
        # As Python's range: the end is not in it.
        start, stop, step = float(value.start or 0), float(value.stop or 0), float(value.step)
        steps = math.ceil((stop - start) / step - 1e-9) - 1 if step > 0 else 0
        return Axis(key, start, start + steps * step, log, None if log else step)
    if isinstance(value, ChoiceSweep) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value.list
    ):
        return Axis(key, choices=[float(number) for number in value.list])  # type: ignore[arg-type]
    message = "a study searches numbers: interval(LOW,HIGH), tag(log,interval(LOW,HIGH)), 1,2,4."
    return Problem(key, written_value, message)


def space_override(space: Sequence[Axis]) -> str:
    """Return the override that sets `study.space`."""
    return override_of("study.space", list(space))


def worker_job_overrides(workers: int, local: bool) -> list[str]:
    """Return the overrides that start a job for each worker, all at the same time.

    Args:
        workers: Number of workers.
        local: Whether they run on this machine.
    """
    jobs = [f"hydra.launcher.n_jobs={workers}"] if local else []
    return [f"study.worker={','.join(map(str, range(workers)))}", *jobs]


def single_trial_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a worker that one of its trials needs when run by itself."""
    return [
        text
        for text in overrides
        if text.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".").split(".")[0]
        not in _STUDY_ONLY
    ]


def overrides_between(before: Config, after: Config) -> list[str]:
    """Return the overrides that turn one config into another, as they are typed.

    Keys that name, place or watch a run are left out.
    """
    old, new = dict(_flatten(before)), dict(_flatten(after))
    return [
        override_of(key, value)
        for key, value in new.items()
        if value != old[key] and key.partition(".")[0] not in _NOT_COMPARED
    ]


def _flatten(section: Any, prefix: str = "") -> list[tuple[str, Any]]:  # noqa: ANN401
    leaves: list[tuple[str, Any]] = []
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            leaves += _flatten(value, f"{prefix}{field.name}.")
        else:
            leaves.append((prefix + field.name, value))
    return leaves
