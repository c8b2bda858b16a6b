"""The command line's `key=value` overrides: parsed, checked and expanded before composing.

Hydra reports one mistake at a time, without similar names, and lets unknown keys through after a
`+`. Values under `hydra` are left to Hydra.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.schema_keys import (
    ConfigGroup,
    all_keys,
    closest_keys,
    closest_names,
    did_you_mean,
)
from rlhf_exp.config.text_values import keep_text
from rlhf_exp.errors import UserError

MAX_POINTS = 10_000
"""Most points of a multirun: each is composed and checked before the first one runs."""
_HYDRAS_LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "local"}
# What a group's null might be meant to say.
_INSTEAD_OF_NULL = {
    "eval": " eval=none evaluates nothing.",
    "tracking": " tracking=disabled records nothing at W&B.",
    "engine": " engine=native is the default.",
}


def prepare(overrides: Sequence[str], groups: Mapping[str, ConfigGroup]) -> list[str]:
    """Return overrides as Hydra is to get them; those that are wrong as they are.

    Text stays as it is typed, a list key's plain value is a list (`rerun=ppo` is `rerun=[ppo]`), a
    `glob` is the choice of the options that it matches, and null for a group without a default
    option, which Hydra cannot read, is left out.

    Args:
        overrides: As on the command line.
        groups: The config groups by name.
    """
    expanded = [_expand_glob(text, groups) for text in _wrap_list_values(overrides)]
    return keep_text([text for text in expanded if not _chooses_nothing(text, groups)])


def _expand_glob(text: str, groups: Mapping[str, ConfigGroup]) -> str:
    override = parse_override(text) if "glob" in text else None
    if not isinstance(override, Override):
        return text
    glob: object = override.value()
    if not isinstance(glob, Glob):
        return text
    group = groups.get(override.key_or_group)
    names = glob.filter(list(group.options)) if group is not None else []
    return f"{override.get_key_element()}=choice({','.join(names)})" if names else text


def _chooses_nothing(text: str, groups: Mapping[str, ConfigGroup]) -> bool:
    key, _, value = text.partition("=")
    return value == "null" and key in groups and groups[key].default is None


def override_problems(overrides: Sequence[str], groups: Mapping[str, ConfigGroup]) -> list[Problem]:
    """Return the problems of overrides: unknown keys and options, wrong types.

    Args:
        overrides: As on the command line; sweeps are checked value by value.
        groups: The config groups by name.
    """
    problems = []
    for text in overrides:
        override = parse_override(text)
        if isinstance(override, Problem):
            problems.append(override)
        else:
            problems += _override_problems(override, groups)
    return problems


def _override_problems(override: Override, groups: Mapping[str, ConfigGroup]) -> list[Problem]:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if override.is_sweep_override() and key.startswith("hydra"):
        return [Problem(key, value, "a multirun has one value of it; give one.")]
    if key in groups:
        return _group_problems(override, groups[key], value)
    if key.startswith("hydra"):
        is_null = "/" in key and not override.is_delete() and override.value() is None
        return [Problem(key, value, "a group needs an option.")] if is_null else []
    if key not in all_keys():
        near = closest_keys(key, list(groups))
        return [Problem(key, value, f"there is no such key.{did_you_mean(near)}")]
    if override.is_delete():
        return [Problem("~" + key, value, "a key cannot be removed; set it to null or a value.")]
    if override.is_add() and not override.is_force_add():
        return [Problem("+" + key, value, f"the key exists: write {key}={value} without the +.")]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        message = f"glob chooses options of a group; list the values of a key: {key}=1,2,3."
        return [Problem(key, value, message)]
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return []
    problems = []
    for value_override in expand_sweep(override):
        parsed_value = parse_override(value_override)
        assert isinstance(parsed_value, Override), "a sweep's value parses like the sweep"
        problems += _value_problems(key, parsed_value)
    return problems


def _group_problems(override: Override, group: ConfigGroup, value: str) -> list[Problem]:
    if override.is_delete():
        return [] if group.default is None else [_no_option("~" + group.name, "", group)]
    if override.is_add():
        message = f"the group exists: write {group.name}={value} without the +."
        return [Problem("+" + group.name, value, message)]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        message = f"matches no option. The options: {', '.join(group.options)}."
        return [Problem(group.name, value, message)]
    problems = []
    for option_override in expand_sweep(override):
        option = option_override.partition("=")[2].strip("'\"")
        if option == "null" and (group.default is not None or override.is_sweep_override()):
            problems.append(_no_option(group.name, option, group))
        elif option not in (*group.options, "null") and (group.name, option) != (
            "hydra/launcher",
            "basic",
        ):
            message = unknown_option(group.name, option, list(group.options))
            problems.append(Problem(group.name, option, message))
    return problems


def _no_option(key: str, value: str, group: ConfigGroup) -> Problem:
    meant = _INSTEAD_OF_NULL.get(group.name, "")
    options = ", ".join(group.options)
    return Problem(key, value, f"the group needs an option.{meant} The options: {options}.")


def unknown_option(group: str, option: str, valid: Sequence[str]) -> str:
    """Return the message for an unknown option of a group, with the valid ones."""
    if group == "hydra/launcher" and option in _HYDRAS_LAUNCHERS:
        return f"this project's own launcher is hydra/launcher={_HYDRAS_LAUNCHERS[option]}."
    if group == "hydra/sweeper":
        return "a search is sweep=ppo_optuna (docs/how-to/sweeps.md); a grid needs no sweeper."
    listed = ", ".join(name for name in valid if not name.endswith("_schema"))
    near = did_you_mean(closest_names(option, valid))
    return f"there is no such option.{near} The options: {listed}."


def _value_problems(key: str, override: Override) -> list[Problem]:
    value_text = (override.input_line or "").partition("=")[2]
    value = override.value()
    if all_keys()[key].section is not None and not isinstance(value, dict):
        # Also an interpolation, which would take the place of the section's keys.
        return [_section_problem(key, value_text)]
    try:
        OmegaConf.update(_scratch_config(), key, value, merge=True)
    except OmegaConfBaseException as error:
        return [value_problem(error, key, value_text)]
    return []


@cache
def _scratch_config() -> DictConfig:
    """Return a config to assign values to; making a fresh one each time takes 20 ms.

    Values left in it do no harm: whether a value fits depends on its own field alone.
    """
    return OmegaConf.structured(Config)


def value_problem(error: OmegaConfBaseException, key: str, value: str) -> Problem:
    """Return OmegaConf's error about a value as a problem in the terms of the schema."""
    full_key = str(error.full_key or key).partition("[")[0]
    config_key = all_keys().get(full_key)
    if config_key is None:
        return Problem(
            full_key, value, f"there is no such key.{did_you_mean(closest_keys(full_key))}"
        )
    if config_key.section is not None:
        return _section_problem(full_key, value)
    if config_key.choices:
        near = closest_names(value, config_key.choices)
        ordered = [*near, *(name for name in config_key.choices if name not in near)]
        return Problem(full_key, value, f"expected one of {', '.join(ordered)}.")
    return Problem(full_key, value, f"expected {config_key.type}.")


def _section_problem(key: str, value: str) -> Problem:
    example = next(name for name in all_keys() if name.startswith(key + "."))
    return Problem(key, value, f"this is a section; set the keys in it, such as {example}.")


def parse_override(text: str) -> Override | Problem:
    """Parse one override; return a problem if it is not valid syntax."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        return Problem(key, "", "expected key=value.")
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:  # also a number of 5000 digits
        reason = (str(error) or type(error).__name__).splitlines()[0]
        quoted = f"{key}=\\'...\\'"
        return Problem(key, value, f"cannot be read ({reason}). Text is quoted twice: {quoted}.")


def _wrap_list_values(overrides: Sequence[str]) -> list[str]:
    lists = {name for name, key in all_keys().items() if key.type.startswith("[")}
    pairs = [text.partition("=") for text in overrides]
    return [
        f"{key}=[{value}]"
        if key in lists and value != "null" and not _is_list_or_function(text, value)
        else text
        for text, (key, _, value) in zip(overrides, pairs, strict=True)
    ]


def _is_list_or_function(text: str, value: str) -> bool:
    if value[:1] in ("[", "$", "") or not value.endswith(")"):
        return value[:1] in ("[", "$", "")
    override = parse_override(text)
    return not isinstance(override, Problem) and override.is_sweep_override()


def swept_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that have several values."""
    parsed = {text: parse_override(text) for text in overrides}
    return [text for text, o in parsed.items() if isinstance(o, Override) and o.is_sweep_override()]


def expand_sweep(override: Override) -> list[str]:
    """Return one override for each value of a sweep; an override without a sweep as it is.

    Raises:
        UserError: For a sweep without discrete values, such as `interval`, without any value, or
            with too many.
    """
    text, key = override.input_line or "", override.get_key_element()
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise UserError(f"{text}: only a search has intervals; list the values, {key}=1,2,3.")
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MAX_POINTS + 1))
    except (HydraException, ValueError, ArithmeticError) as error:  # such as a step of 0
        raise UserError(f"{text}: cannot be counted up ({error}).") from error
    if not values:
        raise UserError(f"{text}: has no value; the end of a range is not in it.")
    if len(values) > MAX_POINTS:
        raise UserError(f"{text}: has more than {MAX_POINTS} values.")
    # Hydra's functions drop the quotes of their arguments.
    return keep_text([f"{key}={value}" for value in values])


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a multirun: one job if nothing is swept.

    The last override of a key counts, as in Hydra's basic sweeper.

    Raises:
        UserError: For an override that cannot be parsed, a sweep without discrete values, or more
            than `MAX_POINTS` points.
    """
    values_of_key: dict[str, list[str]] = {}
    for text in overrides:
        override = parse_override(text)
        if isinstance(override, Problem):
            raise UserError(str(override))
        values_of_key[override.get_key_element()] = expand_sweep(override)
    count = math.prod(map(len, values_of_key.values()))
    if count > MAX_POINTS:
        raise UserError(f"the sweep has {count} points, and {MAX_POINTS} are the most.")
    return [list(point) for point in itertools.product(*values_of_key.values())]


def several_values_problem(text: str, groups: Mapping[str, ConfigGroup]) -> Problem:
    """Return the problem of a sweep in a single run."""
    key, _, value = text.partition("=")
    config_key = all_keys().get(key)
    remedy = ""
    if config_key is not None and key not in groups and config_key.type.startswith("["):
        remedy = f" a list is written {key}=[{value}]."
    elif config_key is not None and config_key.type.startswith("text"):
        remedy = f" text with a comma is quoted twice: {key}=\\'...\\'."
    return Problem(key, value, f"several values need -m.{remedy}")


def point_labels(points: Sequence[Sequence[str]]) -> list[str]:
    """Return a label for each point: its overrides that not all points have."""
    common = set.intersection(*(set(point) for point in points)) if points else set()
    return [" ".join(text for text in point if text not in common) for point in points]
