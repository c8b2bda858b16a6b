"""Overrides that a plan prints for a GPU: they are enough, each is needed, and no key changes."""

from __future__ import annotations

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import Config
from rlhf_exp.models.architecture import count_parameters
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
    assert sorted(found) == [size for size in (24, 40, 80, 141) if too_large(config, size)]
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


ALL_LAYERS = ("sft.train_blocks=null", "reward.train_blocks=null", "ppo.train_blocks=null")


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_all_layers_of_20b_fit_8_gpus_of_141_gb(strategy: str) -> None:
    """With the reward model beside the policy; where each held a whole one they would not."""
    spread = (f"distributed={strategy}", "distributed.processes=8", "ppo.batch=8")
    shared = "ppo.reward.placement=shared"
    assert too_large(config_of("experiment=hh_20b", *ALL_LAYERS, *spread, shared), 141) == []
    replicated = ("distributed=ddp", *spread[1:])
    alone = too_large(config_of("experiment=hh_20b", *ALL_LAYERS, *replicated, shared), 141)
    assert alone == ["sft", "reward", "ppo"]


def test_a_node_holds_a_copy_of_its_own() -> None:
    """Sixteen processes that divide within machines of eight hold what eight hold."""
    shape = shape_for(config_of("experiment=hh_20b").model)
    assert shape is not None
    numbers = ("distributed.processes=16", "ppo.batch=16", "ppo.reward.placement=shared")
    many = ("experiment=hh_20b", "distributed=fsdp", *numbers)
    over_all, over_node = (
        stage_memory(config_of(*many, f"distributed.shard_over={over}"), "ppo", shape)
        for over in ("all", "node")
    )
    assert over_node.optimizer == pytest.approx(2 * over_all.optimizer, rel=1e-6)


def test_frozen_weights_of_ppo_are_rounded_with_their_originals_on_the_host() -> None:
    given = ("model=gpt_neox_20b", "model.dtype=float32", "distributed.precision=bfloat16")
    config = config_of("experiment=hh_20b", *given, "distributed=ddp", "ppo.train_blocks=2")
    shape = shape_for(config.model)
    assert shape is not None
    total = count_parameters(shape).total
    trained = count_parameters(shape).trainable(2, tied=False)
    ppo = stage_memory(config, "ppo", shape)
    assert ppo.weights == (total - trained) * 2 + trained * 4
    assert ppo.host == (total - trained) * 4
    assert ppo.rollout_copy == trained * 2
    elsewhere = config_of("experiment=hh_20b", "ppo.generation.engine=vllm", *given)
    assert stage_memory(elsewhere, "ppo", shape).rollout_copy == 0
    ahead = config_of("experiment=hh_20b", "ppo.generation.ahead=1", "ppo.train_blocks=2")
    assert stage_memory(ahead, "ppo", shape).rollout_copy == trained * 2
    sft = stage_memory(config, "sft", shape)
    assert (sft.host, sft.rollout_copy) == (0, 0)
    stored = stage_memory(config_of("experiment=hh_20b", "distributed=ddp"), "ppo", shape)
    assert stored.host == 0, "bfloat16 in the file: nothing is rounded"


def test_the_words_of_a_plan() -> None:
    assert (
        str(Fit(40, ("a=1", "b=2"), ("sft",))) == "fits 40 GB, with the same results, with: a=1 b=2"
    )
    assert str(Fit(24, None, ("sft", "ppo"))) == (
        "24 GB: no override was found with which sft and ppo fit"
    )
