"""Composing YAML groups and overrides to a `Config`, and converting configs to plain values.

Hydra composes; its errors become `UserError`s in the terms of the schema. `to_dict` and `from_dict`
are the form in which manifests hold configs.
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
from rlhf_exp.config.folders import file_problems, search_overrides
from rlhf_exp.config.launchers import SLURM_LAUNCHER, LocalConfig, SlurmConfig
from rlhf_exp.config.overrides import unknown_option, value_problem
from rlhf_exp.config.problems import Problem, raise_problems
from rlhf_exp.config.schema_keys import CONF, all_keys
from rlhf_exp.config.text_values import keep_text, literal
from rlhf_exp.errors import UserError


@dataclass(frozen=True)
class ComposedConfig:
    """A composed config, with the facts of it that only Hydra knows.

    Attributes:
        config: The experiment.
        choices: The option chosen of each group, Hydra's own included; None for none.
        sweep: The sweeps that the config files ask for (`hydra.sweeper.params`), as overrides.
        multirun: Whether the config files ask for a multirun (`hydra.mode`).
        site: The Slurm site where the jobs run, if one is chosen.
    """

    config: Config
    choices: dict[str, str | None]
    sweep: list[str]
    multirun: bool
    site: SlurmConfig | None


def register_schema() -> None:
    """Register the schema with Hydra, under the names that the YAML files use."""
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
        folders: `conf/`, then further config folders, as `config_folders` returns them.

    Raises:
        UserError: For an unknown name, a wrong type, or a YAML file with a mistake.
    """
    register_schema()
    given = [*search_overrides(folders[1:]), *keep_text(overrides)]
    previous_hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with as_user_errors(), hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
            tree = hydra.compose("config", given, return_hydra_config=True)
            hydra_section = tree.hydra
            choices = dict(hydra_section.runtime.choices)
            _check_files(folders, given, choices)
            swept = OmegaConf.select(hydra_section.sweeper, "params") or {}
            on_slurm = hydra_section.launcher.get("_target_") == SLURM_LAUNCHER
            site = OmegaConf.to_object(hydra_section.launcher) if on_slurm else None
    finally:
        GlobalHydra.instance().hydra = previous_hydra
    if hydra_section.job.chdir:
        message = "relative paths start where the command is given; leave it out."
        raise UserError(str(Problem("hydra.job.chdir", "true", message)))
    multirun = hydra_section.mode == RunMode.MULTIRUN
    OmegaConf.set_readonly(tree, False)
    OmegaConf.set_struct(tree, False)
    del tree["hydra"]
    sweep = [f"{key}={value}" for key, value in swept.items()]
    assert site is None or isinstance(site, SlurmConfig), "the option starts from the schema"
    return ComposedConfig(to_config(tree), choices, sweep, multirun, site)


_checked_files: set[tuple[object, ...]] = set()
"""Folders and options whose files have no problem: a sweep's points are composed of few sets."""


def _check_files(
    folders: Sequence[Path], overrides: list[str], choices: Mapping[str, str | None]
) -> None:
    """Raise the problems of the config files that are composed.

    Raises:
        UserError: Names file, line and key.
    """
    composed = (*folders, *choices.items())
    if composed in _checked_files:
        return
    loader = GlobalHydra.instance().config_loader()
    files = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
    raise_problems(
        problem
        for file in files
        if file.config_path is not None
        for problem in file_problems(folders, file.config_path, file.package or "")
    )
    _checked_files.add(composed)


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
    """Return the message for a composition error: file, key and remedy, without Hydra's advice."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return str(Problem(group, option, unknown_option(group, option, error.options)))
    if isinstance(error, yaml.YAMLError):
        return "\n  ".join(str(error).splitlines())
    summary = (str(error) or type(error).__name__).splitlines()[0]
    omegaconf_error: BaseException | None = error
    while omegaconf_error is not None and not isinstance(omegaconf_error, OmegaConfBaseException):
        omegaconf_error = omegaconf_error.__cause__ or omegaconf_error.__context__
    if omegaconf_error is None:
        return summary
    key, reason = str(omegaconf_error.full_key or ""), str(omegaconf_error).splitlines()[0]
    file = f"{summary.split(':')[0]}: " if summary.startswith("In '") else ""
    if omegaconf_error is error or not key or key.startswith("hydra"):
        return f"{file}{key}{': ' if key else ''}{reason}"
    return f"{file}{key}: {value_problem(omegaconf_error, key, '').message} ({reason})"


def to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 - the config or one of its sections
    """Return a config as plain JSON values, enums by name."""
    return {field.name: _plain_value(getattr(config, field.name)) for field in fields(config)}


def _plain_value(value: Any) -> Any:  # noqa: ANN401 - any field's value
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain_value(element) for element in value]
    return value


def to_yaml(config: Config) -> str:
    """Return a config as YAML, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def unknown_keys(stored: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a stored config that the schema no longer has."""
    return _known_and_unknown(stored)[1]


def from_dict(stored: Mapping[str, Any]) -> Config:
    """Return a stored config, whatever version of the schema wrote it.

    Keys that the schema no longer has are left out (`unknown_keys` names them); keys added since
    take their defaults.

    Args:
        stored: A result of `to_dict`.

    Raises:
        UserError: For a value that the schema no longer accepts.
    """
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), _known_and_unknown(stored)[0])
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"stored config, {error.full_key}: {reason}.") from error
    assert isinstance(config, Config), "the merge starts from the schema"
    return config


def _known_and_unknown(
    stored: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in stored.items():
        key = all_keys().get(prefix + name)
        if key is None or (key.section is not None) != isinstance(value, Mapping):
            unknown.append(prefix + name)
        elif key.section is not None:
            known[name], unknown_below = _known_and_unknown(value, f"{prefix}{name}.")
            unknown += unknown_below
        else:
            known[name] = _literal(value) if "text" in key.type else value
    return known, unknown


def _literal(value: Any) -> Any:  # noqa: ANN401 - any field's value
    """Return a stored value whose text stays text, also where it looks like an interpolation."""
    if isinstance(value, list):
        return [_literal(element) for element in value]
    return literal(value) if isinstance(value, str) else value
