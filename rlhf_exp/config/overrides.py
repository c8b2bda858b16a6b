"""The command line's `key=value` overrides: parsed, checked and expanded before composing.

Hydra reports one mistake at a time, without similar names, and lets unknown keys through after a
`+`. Overrides under `hydra` and the YAML files are left to Hydra.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
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
from rlhf_exp.errors import UserError


def override_problems(overrides: Sequence[str], groups: dict[str, ConfigGroup]) -> list[Problem]:
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
        elif not override.key_or_group.startswith("hydra"):
            problems += _override_problems(override, groups)
    return problems


def _override_problems(override: Override, groups: dict[str, ConfigGroup]) -> list[Problem]:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if key in groups:
        return _group_problems(override, groups[key], value)
    if key not in all_keys():
        near = closest_keys(key, list(groups))
        return [Problem(key, value, f"there is no such key.{did_you_mean(near)}")]
    if override.is_delete():
        return [Problem("~" + key, value, "a key cannot be removed; set it to null or a value.")]
    if override.is_add() and not override.is_force_add():
        return [Problem("+" + key, value, f"the key exists: write {key}={value} without the +.")]
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
        return []
    if override.is_add():
        message = f"the group exists: write {group.name}={value} without the +."
        return [Problem("+" + group.name, value, message)]
    problems = []
    for option_override in expand_sweep(override):
        option = option_override.partition("=")[2].strip("'\"")
        if option not in group.options and option != "null":
            problems.append(
                Problem(group.name, option, unknown_option(option, list(group.options)))
            )
    return problems


def unknown_option(option: str, valid: Sequence[str]) -> str:
    """Return the message for an unknown option of a group: the valid ones, closest first."""
    near = closest_names(option, valid)
    ordered = [*near, *(name for name in valid if name not in near)]
    return f"there is no such option. The options: {', '.join(ordered)}."


def _value_problems(key: str, override: Override) -> list[Problem]:
    value_text = (override.input_line or "").partition("=")[2]
    try:
        value = override.value()
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
    full_key = str(error.full_key or key)
    config_key = all_keys().get(full_key.partition("[")[0])
    if config_key is None:
        return Problem(
            full_key, value, f"there is no such key.{did_you_mean(closest_keys(full_key))}"
        )
    if config_key.section is not None:
        example = next(name for name in all_keys() if name.startswith(full_key + "."))
        return Problem(
            full_key, value, f"this is a section; set the keys in it, such as {example}."
        )
    if config_key.choices:
        near = closest_names(value, config_key.choices)
        ordered = [*near, *(name for name in config_key.choices if name not in near)]
        return Problem(full_key, value, f"expected one of {', '.join(ordered)}.")
    return Problem(full_key, value, f"expected {config_key.type}.")


def parse_override(text: str) -> Override | Problem:
    """Parse one override; return a problem if it is not valid syntax."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        return Problem(key, "", "expected key=value.")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        quoted = f"{key}=\\'...\\'"
        return Problem(key, value, f"cannot be read ({reason}). Text is quoted twice: {quoted}.")


def wrap_list_values(overrides: Sequence[str]) -> list[str]:
    """Return overrides where a list key's plain value is a list: `rerun=ppo` is `rerun=[ppo]`."""
    lists = {name for name, key in all_keys().items() if key.type.startswith("[")}
    pairs = [text.partition("=") for text in overrides]
    return [
        f"{key}=[{value}]" if key in lists and value[:1] not in ("[", "$", "") else text
        for text, (key, _, value) in zip(overrides, pairs, strict=True)
    ]


def swept_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that have several values."""
    parsed = {text: parse_override(text) for text in overrides}
    return [text for text, o in parsed.items() if isinstance(o, Override) and o.is_sweep_override()]


def expand_sweep(override: Override) -> list[str]:
    """Return one override for each value of a sweep; an override without a sweep as it is.

    Raises:
        UserError: For a sweep without discrete values, such as `interval`.
    """
    text, key = override.input_line or "", override.get_key_element()
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise UserError(f"{text}: only a search has intervals; list the values, {key}=1,2,3.")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a multirun: one job if nothing is swept.

    The last override of a key counts, as in Hydra's basic sweeper.

    Raises:
        UserError: For an override that cannot be parsed, or a sweep without discrete values.
    """
    values_of_key: dict[str, list[str]] = {}
    for text in overrides:
        override = parse_override(text)
        if isinstance(override, Problem):
            raise UserError(str(override))
        values_of_key[override.get_key_element()] = expand_sweep(override)
    return [list(point) for point in itertools.product(*values_of_key.values())]


def point_labels(points: Sequence[Sequence[str]]) -> list[str]:
    """Return a label for each point: its overrides that not all points have."""
    common = set.intersection(*(set(point) for point in points)) if points else set()
    return [" ".join(text for text in point if text not in common) for point in points]
