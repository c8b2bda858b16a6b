"""Configs as plain values: stored in manifests, read back from them, shown as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.config.keys import all_keys
from rlhf_exp.config.root import Config
from rlhf_exp.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 - the config or one of its sections
    """Return a config as plain JSON values, enums by name."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def _plain(value: Any) -> Any:  # noqa: ANN401 - any field's value
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def to_yaml(config: Config) -> str:
    """Return a config as YAML, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def unknown_keys(stored: Mapping[str, Any]) -> list[str]:
    """Return the keys of a stored config that the schema has no longer, dotted."""
    return _split(stored)[1]


def from_dict(stored: Mapping[str, Any]) -> Config:
    """Return the config that was stored, whatever version of the schema wrote it.

    Keys that the schema has no longer are left out (`unknown_keys` names them); keys that it has
    since take their defaults.

    Args:
        stored: As `to_dict` made it.

    Raises:
        UserError: For a value that the schema does not accept any more.
    """
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), _split(stored)[0])
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"stored config, {error.full_key}: {reason}.") from error
    assert isinstance(config, Config), "the merge starts from the schema"
    return config


def _split(stored: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in stored.items():
        key = all_keys().get(prefix + name)
        if key is None or (key.section is not None) != isinstance(value, Mapping):
            unknown.append(prefix + name)
        elif key.section is not None:
            known[name], below = _split(value, f"{prefix}{name}.")
            unknown += below
        else:
            known[name] = value
    return known, unknown
