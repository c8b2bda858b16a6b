"""From a study's config to what the search works with, and to what its trials have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.config.fields import key_content
from rlhf_exp.config.ppo import Scale
from rlhf_exp.config.problems import written
from rlhf_exp.config.root import Config
from rlhf_exp.config.space import ends, own_values, settled_space, whole
from rlhf_exp.config.study import Axis
from rlhf_exp.config.trial import iterations, trial_config, updates, with_values
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.objective import Measure
from rlhf_exp.experiment import UNNAMED
from rlhf_exp.pipeline.plan import plan, store_of
from rlhf_exp.search.journal import Pruning
from rlhf_exp.search.sampling import distribution_of
from rlhf_exp.search.search import Search, Wanted
from rlhf_exp.store.files import write_json_atomic

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

ABOUT = "about"
_COMMAND = "command.json"


def study_folder(output_dir: Path, name: str) -> Path:
    """Return where the journal of a study is."""
    return output_dir / "sweeps" / name / "study"


def folder_of(config: Config) -> Path:
    """Return where the journal of a config's study is."""
    return study_folder(Path(config.output_dir), config.name or UNNAMED)


def measure_of(config: Config) -> Measure:
    """Return what is maximised."""
    study = config.study
    scaled = config.ppo.reward.scale is not Scale.none
    return Measure(study.objective.value, study.kl_budget, study.kl_coef, scaled)


def pruning_of(config: Config) -> Pruning:
    """Return when trials are given up; they are evaluated as often as the config says."""
    study, ppo = config.study, config.ppo
    evaluations = -(-iterations(ppo) * updates(ppo) // ppo.eval_every)
    return Pruning(study.pruner.value, study.prune_after, study.warmup, evaluations)


def search_of(config: Config) -> Search:
    """Open the study, as the config's worker.

    Raises:
        UserError: It is another study than the config's.
    """
    study = config.study
    assert study.trials is not None, "checked with the config"
    space = {axis.key: _distribution(axis) for axis in settled_space(config)}
    first = own_values(config)
    wanted = Wanted(study.trials, space, first, study.startup, study.workers, study.seed)
    name, pruning = config.name or UNNAMED, pruning_of(config)
    search = Search(folder_of(config), store_of(config), name, wanted, pruning, worker=study.worker)
    _refuse_another(search.study, config)
    return search


def write_command(config: Config, overrides: list[str]) -> None:
    """Keep the command line of a trial, what is searched left out."""
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / _COMMAND, overrides)


def read_command(config: Config) -> list[str]:
    """Return what `write_command` kept."""
    try:
        found: list[str] = json.loads((folder_of(config) / _COMMAND).read_text("utf-8"))
    except FileNotFoundError:
        return []
    return found


def _distribution(axis: Axis) -> BaseDistribution:
    limits = ends(axis)
    return distribution_of((limits[0], limits[1]), axis.log, axis.step, axis.choices, whole(axis))


def _about(config: Config) -> dict[str, str]:
    """Return what all trials of a study have in common, as text by name."""
    searched = {axis.key: 0 for axis in config.study.space}
    steps = plan(with_values(trial_config(config, {}), searched))
    found = {f"{step.stage} model": step.key for step in steps if step.stage != "ppo"}
    found["objective"] = written(config.study.objective)
    found["length"] = written(config.study.length)
    found["searched"] = ", ".join(sorted(searched))
    for key, value in _flat(key_content(trial_config(config, {}).ppo), "ppo.").items():
        if key not in searched:
            found[key] = str(value)
    return found | {"data and rest": steps[-1].key}


def _refuse_another(study: Study, config: Config) -> None:
    """Stop where trials would be compared that cannot be."""
    ours, theirs = _about(config), study.user_attrs.get(ABOUT)
    if theirs is None:
        study.set_user_attr(ABOUT, ours)
        return
    if theirs == ours:
        return
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    listed = "".join(
        f"\n  {name}: {theirs.get(name, 'none')} in the study, {ours.get(name, 'none')} now"
        for name in names
        if name != "data and rest" or len(names) == 1
    )
    raise UserError(
        f"name={config.name}: that study is of something else, and its trials cannot be compared "
        f"with new ones:{listed}\nUse another name, or give the study's own values"
    )


def _flat(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
