"""The values of settings as text: of a config, and of a command line's overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def format_override(value: object) -> str:
    """Return a value as one would write it on the command line: `3e-4` and `0.0003` are one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.12g}"
    return str(value)


def parse_override(text: str) -> str:
    """Return the value of an override, written as `format_override` writes it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and text[:1] in ("'", '"'):  # text that looks like a number
        return value
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a word
        try:
            return format_override(float(value))
        except ValueError:
            return value
    return format_override(value)


def sort_key(text: str) -> tuple[int, float, str]:
    """Return the sort key of a value: numbers by size, then words."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def override_values(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of a command line by key."""
    pairs = (text.partition("=") for text in overrides)
    return {key.lstrip("+~"): parse_override(value) for key, sign, value in pairs if sign}
