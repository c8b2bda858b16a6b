"""From a study's config and chosen values to the config of one trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.ppo import PpoConfig, SelectBy
from rlhf_exp.config.problems import written
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.study import Length, Objective, StudyConfig
from rlhf_exp.config.training import Select

Values = Mapping[str, float]
# What a run is called, where it goes and how it is watched is not part of its command line.
_ASIDE = ("study", "stage", "eval", "name", "output_dir", "plan", "cache", "rerun")


def updates(ppo: PpoConfig) -> int:
    """Return the optimizer steps of one iteration of PPO."""
    return -(-ppo.rollouts // ppo.batch) * ppo.epochs


def iterations(ppo: PpoConfig) -> int:
    """Return the iterations of a whole run of PPO."""
    return -(-ppo.steps // updates(ppo))


def with_values(section: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any section
    """Return a config section with other values at some dotted keys."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        inner = with_values(getattr(section, name), {rest: value}) if rest else value
        section = replace(section, **{name: inner})
    return section


def trial_config(config: Config, values: Values) -> Config:
    """Return the experiment of one trial: PPO with chosen values, selecting by the objective.

    With `study.length=responses` it samples as many responses as the config would, up to a whole
    iteration, and is evaluated as often: trials of like cost, comparable at each evaluation.

    Args:
        config: The study's.
        values: By dotted key.
    """
    study, before = config.study, config.ppo
    ppo: PpoConfig = with_values(config, values).ppo
    if study.length is Length.responses:
        whole = max(1, round(iterations(before) * before.rollouts / ppo.rollouts))
        steps = whole * updates(ppo)
        scaled = {
            name: max(1, round(steps * getattr(before, name) / before.steps))
            for name in ("eval_every", "checkpoint_every", "warmup_steps")
            if getattr(before, name)
        }
        ppo = replace(ppo, steps=steps, **scaled)
    wins = study.objective is Objective.win_rate_at_kl
    ppo = replace(ppo, select_by=SelectBy.win_rate if wins else SelectBy.reward)
    if study.objective is Objective.final_reward:
        ppo = replace(ppo, select=Select.last)
    elif study.objective is Objective.penalised_reward:
        ppo = replace(ppo, select=Select.best, kl=replace(ppo.kl, select_coef=study.kl_coef))
    else:
        ppo = replace(ppo, select=Select.best, kl=replace(ppo.kl, budget=study.kl_budget))
    return replace(
        config,
        stage=Stage.ppo,
        eval=replace(config.eval, suite=Suite.none),
        ppo=ppo,
        study=StudyConfig(),
    )


def differences(before: Config, after: Config) -> list[str]:
    """Return the overrides that turn one config into another, as they are typed."""
    first, second = dict(_flat(before)), dict(_flat(after))
    return [
        f"{key}={written(value)}"
        for key, value in second.items()
        if value != first[key] and key.partition(".")[0] not in _ASIDE
    ]


def _flat(section: Any, prefix: str = "") -> list[tuple[str, Any]]:  # noqa: ANN401
    found: list[tuple[str, Any]] = []
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            found += _flat(value, f"{prefix}{item.name}.")
        else:
            found.append((prefix + item.name, value))
    return found
