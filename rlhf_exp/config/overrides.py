"""The command line's `key=value` overrides, checked against schema and groups before composing.

Hydra reports one mistake at a time, without the closest names, and lets unknown keys through after
a `+`. What is left to Hydra: everything under `hydra`, and the YAML files.
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


def parse_override(text: str) -> Override | Problem:
    """Parse one override."""
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


def expand_sweep(override: Override) -> list[str]:
    """Return a sweep's overrides one by one; an override without a sweep as it is.

    Raises:
        UserError: For a sweep without discrete values, such as `interval`.
    """
    text, key = override.input_line or "", override.get_key_element()
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise UserError(f"{text}: only a search has intervals; list the values, {key}=1,2,3.")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def swept_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of the overrides that have several values."""
    parsed = {text: parse_override(text) for text in overrides}
    return [text for text, o in parsed.items() if isinstance(o, Override) and o.is_sweep_override()]


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a multirun; of one job where nothing is swept.

    A key that comes twice has its last value, as in Hydra's basic sweeper.
    """
    axes: dict[str, list[str]] = {}
    for text in overrides:
        override = parse_override(text)
        if isinstance(override, Problem):
            raise UserError(str(override))
        axes[override.get_key_element()] = expand_sweep(override)
    return [list(point) for point in itertools.product(*axes.values())]


def point_labels(points: Sequence[Sequence[str]]) -> list[str]:
    """Return what tells each point from the others: the overrides that not all have."""
    common = set.intersection(*(set(point) for point in points)) if points else set()
    return [" ".join(text for text in point if text not in common) for point in points]


def override_problems(overrides: Sequence[str], groups: dict[str, ConfigGroup]) -> list[Problem]:
    """Return all that is wrong with the overrides themselves: names, options, types.

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
            problems += _check(override, groups)
    return problems


def _check(override: Override, groups: dict[str, ConfigGroup]) -> list[Problem]:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if key in groups:
        return _check_group(override, groups[key], value)
    if key not in all_keys():
        near = closest_keys(key, list(groups))
        return [Problem(key, value, f"there is no such key.{did_you_mean(near)}")]
    if override.is_delete():
        return [Problem("~" + key, value, "a key cannot be removed; set it to null or a value.")]
    if override.is_add() and not override.is_force_add():
        return [Problem("+" + key, value, f"the key exists: write {key}={value} without the +.")]
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return []
    found = []
    for single in expand_sweep(override):
        parsed = parse_override(single)
        assert isinstance(parsed, Override), "a sweep's value parses like the sweep"
        found += _check_value(key, parsed)
    return found


def _check_group(override: Override, group: ConfigGroup, value: str) -> list[Problem]:
    if override.is_delete():
        return []
    if override.is_add():
        message = f"the group exists: write {group.name}={value} without the +."
        return [Problem("+" + group.name, value, message)]
    found = []
    for single in expand_sweep(override):
        option = single.partition("=")[2].strip("'\"")
        if option not in group.options and option != "null":
            found.append(Problem(group.name, option, unknown_option(option, list(group.options))))
    return found


def unknown_option(option: str, valid: Sequence[str]) -> str:
    """Return the message for an unknown option of a group: the valid ones, closest first."""
    near = closest_names(option, valid)
    ordered = [*near, *(name for name in valid if name not in near)]
    return f"there is no such option. The options: {', '.join(ordered)}."


def _check_value(key: str, override: Override) -> list[Problem]:
    written = (override.input_line or "").partition("=")[2]
    try:
        value = override.value()
        OmegaConf.update(_tried_on(), key, value, merge=True)
    except OmegaConfBaseException as error:
        return [value_problem(error, key, written)]
    return []


@cache
def _tried_on() -> DictConfig:
    """Return a config on which values are tried; making a fresh one each time takes 20 ms.

    Values left on it do no harm: whether one fits depends on its own field alone.
    """
    return OmegaConf.structured(Config)


def value_problem(error: OmegaConfBaseException, key: str, value: str) -> Problem:
    """Return what OmegaConf found wrong with a value, in the words of the schema."""
    full = str(error.full_key or key)
    known = all_keys().get(full.partition("[")[0])
    if known is None:
        return Problem(full, value, f"there is no such key.{did_you_mean(closest_keys(full))}")
    if known.section is not None:
        example = next(name for name in all_keys() if name.startswith(full + "."))
        return Problem(full, value, f"this is a section; set the keys in it, such as {example}.")
    if known.choices:
        near = closest_names(value, known.choices)
        ordered = [*near, *(name for name in known.choices if name not in near)]
        return Problem(full, value, f"expected one of {', '.join(ordered)}.")
    return Problem(full, value, f"expected {known.type}.")
