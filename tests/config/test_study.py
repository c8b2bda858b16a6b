"""A study's config: what is searched, what is refused, and the config of a trial."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import ComposedConfig, compose, from_dict, to_dict
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.fields import in_key
from rlhf_exp.config.schema_keys import all_keys, read_groups
from rlhf_exp.config.search_space import (
    base_values,
    bounded_space,
    overrides_between,
    single_trial_overrides,
    trial_config,
    worker_overrides,
)
from rlhf_exp.config.study import Axis, StudyConfig
from rlhf_exp.config.training import Select, SelectBy


def composed(*overrides: str) -> ComposedConfig:
    return compose(["sweep=ppo_optuna", *overrides])


def config_of(*overrides: str) -> Config:
    return composed(*overrides).config


def complaints(*overrides: str) -> list[str]:
    return [str(problem) for problem in config_problems(config_of(*overrides), multirun=True)]


def searching(**values: object) -> str:
    listed = ",".join(f"{name}:{value}" for name, value in values.items())
    return "study.space=[{" + listed + "}]"


@pytest.mark.parametrize("experiment", ["demo", "smoke"])
def test_the_usual_space_suits_the_experiments(experiment: str) -> None:
    config = config_of(f"experiment={experiment}")
    assert config_problems(config, multirun=True) == []
    assert [axis.key for axis in bounded_space(config)] == [
        "ppo.lr",
        "ppo.kl.coef",
        "ppo.clip_range",
        "ppo.epochs",
        "ppo.lam",
        "ppo.rollouts",
    ]


def test_an_axis_around_the_configs_value() -> None:
    lr, *_, rollouts = bounded_space(config_of("experiment=demo"))
    # 3e-4 by and times 10; 128 by and times 2, in whole minibatches of 32.
    assert (lr.low, lr.high, lr.log) == (3e-5, 3e-3, True)
    assert (rollouts.low, rollouts.high, rollouts.step, rollouts.log) == (64, 256, 32, False)
    # 112 by and times 2 is 56 to 224, in whole minibatches of 48.
    *_, odd = bounded_space(config_of("ppo.rollouts=112", "ppo.batch=48"))
    assert (odd.low, odd.high) == (96, 192)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            searching(key="reward.lr", low=1, high=2),
            "only keys of PPO are searched: data and reward",
        ),
        (searching(key="ppo.lrr", low=1, high=2), "there is no such key. Did you mean ppo.lr"),
        (searching(key="ppo.seed", low=1, high=2), "a seed is not to be searched"),
        (searching(key="ppo.eval_prompts", low=1, high=2), "it would change the objective"),
        (searching(key="ppo.schedule", low=1, high=2), "only numbers are searched; this is const"),
        (searching(key="ppo.micro_batch", low=1, high=2), "it does not change the result"),
        (searching(key="ppo.generation.temperature", low=1, high=2), "how answers are sampled"),
        (searching(key="ppo.lr", low=2, high=1), "low must be below high"),
        (searching(key="ppo.lr", low=0, high=1, log="true"), "logarithmic scale needs low above 0"),
        (searching(key="ppo.lr", low=1), "needs low and high, or choices"),
        (searching(key="ppo.lr", low=1, high=2, choices="[1]"), "give one of choices, around, or"),
        (searching(key="ppo.lr", low=1, around=2), "give one of choices, around, or low and high"),
        (searching(key="ppo.kl.stop", around=2), "there is nothing around 0 or null"),
        (searching(key="ppo.epochs", low=1, high=2.5), "takes whole numbers, and 2.5 is none"),
        (searching(key="ppo.epochs", choices="[1,1]"), "a choice is there twice"),
        (searching(key="ppo.rollouts", low=16, high=64), "an iteration has only ppo.rollouts=16"),
        (searching(key="ppo.lam", low=0.9, high=1.1), "must be in [0, 1]. (a trial of study.space"),
        ("stage=reward", "stage=reward: a study is of PPO"),
        ("study.kl_budget=0", "study.kl_budget=0.0: must be a number above 0"),
        ("study.workers=0", "study.workers=0: must be at least 1"),
        ("ppo.use=demo", "ppo.use=demo: a study trains PPO"),
    ],
)
def test_what_cannot_be_searched(override: str, complaint: str) -> None:
    problems = complaints(override)
    assert len(problems) == 1
    assert complaint in problems[0]


def test_a_trial_samples_as_many_responses_as_the_config() -> None:
    config = config_of("experiment=demo")
    # Demo: 480 steps of 32, 128 rollouts and 4 epochs: 16 updates an iteration, 30 iterations,
    # 3840 responses, 6 evaluations.
    assert (config.ppo.iterations, config.ppo.updates) == (30, 16)
    ppo = trial_config(config, {"ppo.rollouts": 256, "ppo.epochs": 1}).ppo
    # 15 iterations of 8 updates.
    assert (ppo.steps, ppo.eval_every, ppo.checkpoint_every) == (120, 20, 40)
    ppo = trial_config(config, {"ppo.rollouts": 96}).ppo
    # 40 iterations of 12 updates.
    assert (ppo.steps, ppo.eval_every) == (480, 80)
    same = trial_config(config_of("experiment=demo", "study.length=steps"), {"ppo.rollouts": 256})
    assert (same.ppo.steps, same.ppo.eval_every) == (480, 80)


def test_a_trial_publishes_what_the_objective_chooses() -> None:
    by_budget = trial_config(config_of("study.kl_budget=7"), {}).ppo
    assert (by_budget.select, by_budget.kl.budget) == (Select.best, 7.0)
    penalised = trial_config(config_of("study.objective=penalised_reward"), {}).ppo
    assert (penalised.kl.budget, penalised.kl.select_coef) == (None, 0.05)
    wins = trial_config(config_of("study.objective=win_rate_at_kl", "study.kl_budget=7"), {}).ppo
    assert (wins.select, wins.kl.budget, wins.select_by) == (Select.best, 7.0, SelectBy.win_rate)
    by_reward = trial_config(config_of("ppo.select_by=win_rate"), {}).ppo
    assert by_reward.select_by is SelectBy.reward, "as the study's objective is"
    last = trial_config(config_of("study.objective=final_reward"), {}).ppo
    assert (last.select, last.kl.budget) == (Select.last, None)


def test_a_trial_is_ppo_alone_and_no_study() -> None:
    trial = trial_config(config_of(), {"ppo.kl.coef": 0.2, "ppo.lr": 1e-4})
    assert (trial.stage, trial.study) == (StageName.ppo, StudyConfig())
    assert (trial.ppo.kl.coef, trial.ppo.lr) == (0.2, 1e-4)
    assert config_problems(trial) == []


def test_nothing_of_a_study_is_in_a_key() -> None:
    assert not any(in_key(key.field) for name, key in all_keys().items() if "study." in name)


def test_a_study_survives_being_stored() -> None:
    config = config_of()
    assert from_dict(to_dict(config)).study == config.study
    assert len(config.study.space) == 6


def launched(*overrides: str) -> tuple[list[str], list[str]]:
    swept = [text for text in overrides if "interval" in text or "range" in text or "," in text]
    base = composed("experiment=demo", *(text for text in overrides if text not in swept))
    command = ["sweep=ppo_optuna", "experiment=demo", *overrides]
    kept, problems = worker_overrides(command, base, read_groups(), multirun=True)
    return kept, [str(problem) for problem in problems]


def space(kept: Sequence[str]) -> dict[str, Axis]:
    return {axis.key: axis for axis in bounded_space(compose(kept).config)}


def test_sweeps_on_the_command_line_are_searched_and_plain_values_are_fixed() -> None:
    overrides, problems = launched(
        "ppo.lr=tag(log,interval(1e-5,1e-3))",
        "ppo.epochs=range(1,5)",
        "ppo.lam=0.9",
        "ppo.batch=16,32",
    )
    assert problems == []
    axes = space(overrides)
    assert axes["ppo.lr"] == Axis("ppo.lr", 1e-5, 1e-3, log=True)
    assert axes["ppo.epochs"] == Axis("ppo.epochs", 1.0, 4.0, step=1.0)
    assert axes["ppo.batch"] == Axis("ppo.batch", choices=[16.0, 32.0])
    assert "ppo.lam" not in axes
    assert compose(overrides).config.ppo.lam == 0.9
    assert {"ppo.kl.coef", "ppo.clip_range", "ppo.rollouts"} < axes.keys()


def test_what_a_study_cannot_sweep() -> None:
    assert launched("ppo.kl.coef=a,b")[1][0].startswith("ppo.kl.coef=a,b: a study searches numbers")
    assert "one config" in launched("model=tiny,pythia_160m")[1][0]


def test_a_trials_command_line_gives_its_config() -> None:
    command = ["experiment=demo", "sweep=ppo_optuna", "study.trials=5", "name=a", "ppo.batch=16"]
    config = compose(command).config
    trial = trial_config(config, {"ppo.lr": 2e-4, "ppo.rollouts": 64})
    overrides = single_trial_overrides(command)
    assert overrides == ["experiment=demo", "ppo.batch=16"]
    alone = [*overrides, *overrides_between(compose(overrides).config, trial)]
    again = compose(alone).config
    assert again.ppo == trial.ppo
    assert base_values(config)["ppo.lr"] == 3e-4
