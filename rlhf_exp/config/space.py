"""What a study searches: the axes of `study.space`, and the syntax of Hydra's sweeps for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)

from rlhf_exp.config.keys import all_keys
from rlhf_exp.config.overrides import parse
from rlhf_exp.config.problems import Problem, written
from rlhf_exp.config.root import Config
from rlhf_exp.config.study import Axis


def whole(axis: Axis) -> bool:
    """Whether a hyperparameter is a whole number."""
    return all_keys()[axis.key].type.startswith("integer")


def own_values(config: Config) -> dict[str, float]:
    """Return the values that the config itself has for what its study searches."""
    return {axis.key: attrgetter(axis.key)(config) for axis in config.study.space}


def settled(axis: Axis, config: Config) -> Axis:
    """Return an axis with its bounds, where it only says how far around the config's value."""
    value = attrgetter(axis.key)(config)
    if axis.around is None or not value or axis.around <= 1:
        return axis
    low, high = value / axis.around, value * axis.around
    if axis.step:
        low, high = math.ceil(low / axis.step) * axis.step, high // axis.step * axis.step
    elif whole(axis):
        low, high = max(1, round(low)), round(high)
    else:
        low, high = float(f"{low:.4g}"), float(f"{high:.4g}")
    return replace(axis, low=low, high=high, log=not axis.step, around=None)


def settled_space(config: Config) -> list[Axis]:
    """Return the axes of a study with their bounds."""
    return [settled(axis, config) for axis in config.study.space]


def ends(axis: Axis) -> list[float]:
    """Return the extreme values of a settled axis, whole numbers as such."""
    values = axis.choices or [axis.low or 0.0, axis.high or 0.0]
    kind = int if whole(axis) else float
    return [kind(min(values)), kind(max(values))]


def with_space(
    overrides: Sequence[str], space: Sequence[Axis], groups: Mapping[str, object]
) -> tuple[list[str], list[Axis], list[Problem]]:
    """Return overrides without sweeps, and the space that they leave.

    A key's `interval`, `range` or list of values is searched instead of what the space has for it.
    A key with a plain value is fixed, and leaves the space.

    Args:
        overrides: As on the command line.
        space: As the config files have it.
        groups: The config groups by name.

    Returns:
        The other overrides, the space, and what is wrong.
    """
    axes, kept, found = {axis.key: axis for axis in space}, [], []
    for text in overrides:
        override = parse(text)
        if isinstance(override, Problem):
            found.append(override)
        elif not override.is_sweep_override():
            axes.pop(override.key_or_group, None)
            kept.append(text)
        elif override.key_or_group in groups or override.key_or_group.startswith("hydra"):
            message = "a study has one config: choose one, and start a study for each."
            found.append(Problem(override.key_or_group, text.partition("=")[2], message))
        else:
            axis = _axis(override)
            if isinstance(axis, Problem):
                found.append(axis)
            else:
                axes[axis.key] = axis
    return kept, list(axes.values()), found


def space_override(space: Sequence[Axis]) -> str:
    """Return the override that sets `study.space`."""
    listed = [
        "{" + ",".join(f"{name}:{written(value)}" for name, value in vars(axis).items()) + "}"
        for axis in space
    ]
    return f"study.space=[{','.join(listed)}]"


def _axis(override: Override) -> Axis | Problem:
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
        isinstance(one, int | float) and not isinstance(one, bool) for one in value.list
    ):
        return Axis(key, choices=[float(one) for one in value.list])  # type: ignore[arg-type]
    message = "a study searches numbers: interval(LOW,HIGH), tag(log,interval(LOW,HIGH)), 1,2,4."
    return Problem(key, written_value, message)
