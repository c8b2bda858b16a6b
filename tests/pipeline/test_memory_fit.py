"""Overrides that a plan prints for a GPU: they are enough, each is needed, and no key changes."""

from __future__ import annotations

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.pipeline.memory_fit import Fit, fits_of
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.pipeline.plan_table import fits, shape_for, stage_memory

CASES = (
    ("experiment=hh_gptj_6b",),
    ("experiment=hh_20b",),
    ("experiment=demo", "model=pythia_160m", "engine=trlx", "sft.micro_batch=256", "sft.batch=256"),
    ("experiment=demo", "model=pythia_1b", "stage=dpo", "dpo.batch=128"),
)


def config_of(*overrides: str) -> Config:
    return compose([*overrides, "plan=true"]).config


def too_large(config: Config, size: int) -> list[str]:
    """Return the stages that are trained and do not fit."""
    shape = shape_for(config.model)
    assert shape is not None
    stages = [step.stage for step in plan(config) if step.stage != "eval"]
    return [stage for stage in stages if not fits(stage_memory(config, stage, shape), size)]


@pytest.mark.parametrize("overrides", CASES)
def test_with_the_overrides_it_fits_and_the_results_are_the_same(
    overrides: tuple[str, ...],
) -> None:
    config = config_of(*overrides)
    found = {fit.size: fit for fit in fits_of(config)}
    assert sorted(found) == [size for size in (24, 40, 80) if too_large(config, size)]
    assert any(fit.overrides for fit in found.values())
    for size, fit in found.items():
        assert list(fit.stages) == too_large(config, size)
        if fit.overrides is None:
            continue
        fitting = config_of(*overrides, *fit.overrides)
        assert not too_large(fitting, size)
        assert [step.key for step in plan(fitting)] == [step.key for step in plan(config)]
        assert len(config_problems(fitting)) <= len(config_problems(config))
        for left_out in fit.overrides:
            others = [override for override in fit.overrides if override != left_out]
            assert too_large(config_of(*overrides, *others), size), left_out


def test_what_fits_is_left_alone() -> None:
    assert list(fits_of(config_of("experiment=smoke"))) == []


def test_models_that_are_given_need_no_memory_to_train() -> None:
    config = config_of("experiment=hh_gptj_6b", "sft.use=a/sft", "reward.use=a/reward")
    assert [fit.size for fit in fits_of(config)] == [24]
    assert next(fits_of(config)).stages == ("ppo",)


def test_the_recipe_for_the_published_machine() -> None:
    """8 GPUs of 40 GB: one option, which changes no key, and is what the plan says itself."""
    recipe, machine = config_of("experiment=hh_gptj_6b"), config_of("experiment=hh_gptj_6b_p4d")
    assert too_large(recipe, 40) == ["sft", "reward"]
    assert too_large(machine, 40) == []
    assert [step.key for step in plan(machine)] == [step.key for step in plan(recipe)]
    advice = next(fit for fit in fits_of(recipe) if fit.size == 40)
    told = config_of("experiment=hh_gptj_6b", *(advice.overrides or ()))
    assert (told.sft, told.reward, told.ppo) == (machine.sft, machine.reward, machine.ppo)
    assert told.distributed == machine.distributed


def test_the_words_of_a_plan() -> None:
    assert (
        str(Fit(40, ("a=1", "b=2"), ("sft",))) == "fits 40 GB, with the same results, with: a=1 b=2"
    )
    assert str(Fit(24, None, ("sft", "ppo"))) == (
        "24 GB: no override was found with which sft and ppo fit"
    )
