"""Composes the YAML groups and overrides to a `Config`, with errors in the user's words.

Composing goes through Hydra; nothing here starts a job.

Configs as plain values: stored in manifests, read back from them, shown as YAML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.launchers import SLURM_LAUNCHER, LocalConfig, SlurmConfig
from rlhf_exp.config.overrides import unknown_option, value_problem
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.schema_keys import CONF, all_keys
from rlhf_exp.errors import UserError


@dataclass(frozen=True)
class ComposedConfig:
    """A composed config.

    Attributes:
        config: The experiment.
        choices: The option chosen of each group, Hydra's own included; None for none.
        sweep: What is swept as the config itself says (`hydra.sweeper.params`), as overrides.
        multirun: Whether the config itself asks for a multirun (`hydra.mode`).
        site: The Slurm site where the jobs run, if one is chosen.
    """

    config: Config
    choices: dict[str, str | None]
    sweep: list[str]
    multirun: bool
    site: SlurmConfig | None


def register_schema() -> None:
    """Make the schema known to Hydra under the name that `config.yaml` has in its defaults."""
    store = ConfigStore.instance()
    store.store("schema", Config)
    store.store("slurm_schema", SlurmConfig, group="hydra/launcher")
    store.store("local_schema", LocalConfig, group="hydra/launcher")


def to_config(tree: DictConfig) -> Config:
    """Return the typed config of a composed tree.

    Raises:
        UserError: For a value that cannot be resolved.
    """
    with as_user_errors():
        config = OmegaConf.to_object(tree)
    assert isinstance(config, Config), "config.yaml starts from the schema"
    return config


def compose(overrides: Sequence[str] = (), folders: Sequence[Path] = (CONF,)) -> ComposedConfig:
    """Compose one experiment.

    Args:
        overrides: As on the command line, without sweeps.
        folders: `conf/`, then further config folders that come before it.

    Raises:
        UserError: For an unknown name, a wrong type, or a YAML file with a mistake.
    """
    register_schema()
    extra = [f"file://{folder.resolve()}" for folder in folders[1:]]
    search = [f"hydra.searchpath=[{','.join(extra)}]"] if extra else []
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with as_user_errors(), hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
            tree = hydra.compose("config", [*search, *overrides], return_hydra_config=True)
            settings = tree.hydra
            params = OmegaConf.select(settings.sweeper, "params") or {}
            chosen = settings.launcher.get("_target_") == SLURM_LAUNCHER
            site = OmegaConf.to_object(settings.launcher) if chosen else None
    finally:
        GlobalHydra.instance().hydra = before
    choices = dict(settings.runtime.choices)
    multirun = settings.mode == RunMode.MULTIRUN
    OmegaConf.set_readonly(tree, False)
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    sweep = [f"{key}={value}" for key, value in params.items()]
    assert site is None or isinstance(site, SlurmConfig), "the option starts from the schema"
    return ComposedConfig(to_config(tree), choices, sweep, multirun, site)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn the errors of Hydra, OmegaConf and YAML into `UserError`s."""
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(explain_error(error)) from error


def explain_error(error: BaseException) -> str:
    """Return what a composition error means, without Hydra's advice."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return str(Problem(group, option, unknown_option(option, error.options)))
    if isinstance(error, yaml.YAMLError):
        return "\n  ".join(str(error).splitlines())
    first = (str(error) or type(error).__name__).splitlines()[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return first
    key, reason = str(cause.full_key or ""), str(cause).splitlines()[0]
    place = f"{first.split(':')[0]}: " if first.startswith("In '") else ""
    if cause is error or not key or key.startswith("hydra"):
        return f"{place}{key}{': ' if key else ''}{reason}"
    return f"{place}{key}: {value_problem(cause, key, '').message} ({reason})"


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
