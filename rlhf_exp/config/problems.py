"""Problems of a config: collected one by one, reported together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError

_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
"""A step of a key: a name, or a number in a list."""


@dataclass(frozen=True)
class Problem:
    """One wrong value, and its remedy.

    Attributes:
        key: The config key, dotted.
        value: Its value as the user would write it.
        message: The expected value and the remedy.
    """

    key: str
    value: str
    message: str

    def __str__(self) -> str:
        """Return the problem as one line."""
        return f"{self.key}={self.value}: {self.message}"


@dataclass
class ConfigChecker:
    """A config and the problems found in it.

    Attributes:
        config: The config to check.
        problems: The problems found so far.
    """

    config: Config
    problems: list[Problem] = field(default_factory=list)

    def value(self, key: str) -> Any:  # noqa: ANN401 - any field's value
        """Return the value at a dotted key, such as `ppo.lr` or `ppo.reward.terms[0].weight`."""
        value: Any = self.config
        for number, name in _STEP.findall(key):
            value = getattr(value, name) if name else value[int(number)]
        return value

    def add(self, key: str, message: str) -> None:
        """Report a problem of the value at a key."""
        self.problems.append(Problem(key, format_value(self.value(key)), message))

    def require(self, holds: bool, key: str, message: str) -> None:
        """Report a problem of the value at a key unless a condition holds."""
        if not holds:
            self.add(key, message)

    def at_least(self, lowest: float, *keys: str) -> None:
        """Report every key whose value is set and below `lowest`."""
        for key in keys:
            value = self.value(key)
            self.require(value is None or value >= lowest, key, f"must be at least {lowest}.")

    def positive(self, *keys: str) -> None:
        """Report every key whose value is set and not a finite number above 0."""
        for key in keys:
            value = self.value(key)
            if value is not None and not 0 < value < float("inf"):
                self.add(key, "must be a number above 0.")

    def fraction(self, *keys: str) -> None:
        """Report every key whose value is set and not above 0 and at most 1."""
        for key in keys:
            value = self.value(key)
            if value is not None and not 0 < value <= 1:
                self.add(key, "must be above 0 and at most 1.")


def format_value(value: Any) -> str:  # noqa: ANN401 - any field's value
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    if is_dataclass(value):
        given = {
            item.name: getattr(value, item.name)
            for item in fields(value)
            if getattr(value, item.name) not in (item.default, [])
        }
        return "{" + ",".join(f"{name}:{format_value(v)}" for name, v in given.items()) + "}"
    return str(value)


def raise_problems(problems: Iterable[Problem | str]) -> None:
    """Raise one error that lists all problems, each once.

    Raises:
        UserError: If there is any problem.
    """
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        raise UserError(lines[0])
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise UserError(f"{len(lines)} problems in the config:{listed}")
