"""What distinguishes runs: the hyperparameters that vary among them, their seeds aside.

A finished run's config is in its manifest. A failed one has only its command line, so that what it
does not say is taken from the runs that do not say it either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

# Where a run was stored and how it was watched does not make it another experiment.
ASIDE = (
    "name",
    "output_dir",
    "plan",
    "probe",
    "cache",
    "rerun",
    "stage",
    "tracking",
    "hydra",
    "launcher",
    "study",
    "sweep",
)
UNKNOWN = "–"


@dataclass(frozen=True)
class Origin:
    """Where a run's settings are read from.

    Attributes:
        overrides: Its command line.
        config: Its resolved config, flat, or `None` where it left none.
    """

    overrides: tuple[str, ...]
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class Settled:
    """What varies among runs.

    Attributes:
        varied: The keys, in the order of the command line.
        settings: For each run its value of each of these, as text.
        seeds: For each run its seed in words, as far as seeds vary.
    """

    varied: tuple[str, ...]
    settings: tuple[dict[str, str], ...]
    seeds: tuple[str, ...]


def settle(origins: Sequence[Origin]) -> Settled:
    """Return what varies among runs.

    The keys of the command line are taken where they tell the runs apart just as the configs do:
    `model=a,b` is one key there and many in the config.
    """
    values = _Values(origins)
    command, config = values.varied_by_command(), values.varied_by_config()
    known = [number for number, one in enumerate(origins) if one.config is not None]
    same = _parts(values, command, known) == _parts(values, config, known)
    keys = command if (same and len(command) <= len(config)) or not config else config
    settings = tuple({key: values.text(n, key) for key in keys} for n in range(len(origins)))
    return Settled(tuple(keys), settings, tuple(values.seed(n) for n in range(len(origins))))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shown(value: object) -> str:
    """Return a value as one would write it on the command line: `3e-4` and `0.0003` are one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.12g}"
    return str(value)


def parsed(text: str) -> str:
    """Return the value of an override, written as `shown` writes it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a word
        try:
            return shown(float(value))
        except ValueError:
            return value
    return shown(value)


def order_of(text: str) -> tuple[int, float, str]:
    """Return what sorts values: numbers by size, then words."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def given(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of a command line by key."""
    pairs = (text.partition("=") for text in overrides)
    return {key.lstrip("+~"): parsed(value) for key, sign, value in pairs if sign}


def is_aside(key: str) -> bool:
    """Whether a key says nothing of the experiment."""
    return key.replace("/", ".").split(".")[0] in ASIDE


def is_seed(key: str) -> bool:
    """Whether a key is a seed: runs that differ in no other are replicates."""
    return key == "seed" or key.endswith(".seed")


class _Values:
    """Every run's value of every key, as far as it is known."""

    def __init__(self, origins: Sequence[Origin]) -> None:
        self.origins = origins
        self.given = [given(one.overrides) for one in origins]
        self.configs = [
            None if one.config is None else {key: shown(item) for key, item in one.config.items()}
            for one in origins
        ]
        self.seed_keys = [key for key in self._keys() if is_seed(key) and self._varies(key)]

    def varied_by_command(self) -> list[str]:
        """Return the keys of command lines whose values differ, in their order."""
        keys = dict.fromkeys(key for one in self.given for key in one)
        return [key for key in keys if _counts(key) and self._varies(key)]

    def varied_by_config(self) -> list[str]:
        """Return the keys of configs whose values differ."""
        configs = [one for one in self.configs if one is not None]
        keys = sorted({key for one in configs for key in one if _counts(key)})
        return [key for key in keys if len({one.get(key) for one in configs}) > 1]

    def text(self, number: int, key: str) -> str:
        """Return a run's value of a key."""
        config = self.configs[number]
        if config is not None and key in config:
            return config[key]
        return self.given[number].get(key) or self._default(key)

    def seed(self, number: int) -> str:
        """Return a run's seeds in words, those that vary."""
        found = {key: self.text(number, key) for key in self.seed_keys}
        if len(set(found.values())) == 1:
            return next(iter(found.values()))
        return ", ".join(f"{key.partition('.')[0]} {value}" for key, value in found.items())

    def _default(self, key: str) -> str:
        """Return the value in runs that do not name the key, if it is the same in all of them."""
        pairs = zip(self.configs, self.given, strict=True)
        found = {
            config[key]
            for config, one in pairs
            if config is not None and key not in one and key in config
        }
        return found.pop() if len(found) == 1 else UNKNOWN

    def _keys(self) -> list[str]:
        known = [*self.given, *(one for one in self.configs if one is not None)]
        return sorted({key for one in known for key in one})

    def _varies(self, key: str) -> bool:
        return len({self.text(number, key) for number in range(len(self.origins))}) > 1


def _counts(key: str) -> bool:
    return not is_aside(key) and not is_seed(key)


def _parts(values: _Values, keys: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Return the number of the part each run falls into, by its values of `keys`."""
    met: dict[tuple[str, ...], int] = {}
    return [met.setdefault(tuple(values.text(n, key) for key in keys), len(met)) for n in numbers]
