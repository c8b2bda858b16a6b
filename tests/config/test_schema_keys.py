from __future__ import annotations

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import ComposedConfig, compose
from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.experiment import PrecisionName, StageName, StrategyName
from rlhf_exp.config.schema_keys import CONF, read_groups

GROUPS = read_groups()
OPTIONS = [(group.name, option) for group in GROUPS.values() for option in group.options]

# The groups and options that the design promises.
PROMISED = {
    "model": "tiny smollm2_135m pythia_160m pythia_1b pythia_6_9b gptj_6b gpt_neox_20b",
    "stage": "sft reward dpo best_of ppo eval pipeline",
    "data": "toy arithmetic hh_rm_static hh_full hh_local",
    "sft": "default recipe",
    "reward": "default recipe published",
    "dpo": "default recipe",
    "ppo": "default recipe rloo grpo reinforce_pp",
    "engine": "native trl trlx",
    "distributed": "single ddp zero1 zero2 zero2_bf16 zero3 zero3_offload fsdp",
    "eval": "none quick blog toxicity reward_quality human harness full",
    "tracking": "offline online disabled",
    "experiment": "demo smoke arithmetic hh_small hh_125m hh_1b hh_gptj_6b hh_gptj_6b_p4d hh_20b",
    "sweep": "ppo_grid ppo_optuna",
    "hydra/launcher": "joblib local parallel slurm",
}


def planned(composed: ComposedConfig) -> list[str]:
    composed.config.plan = True
    return [str(problem) for problem in config_problems(composed.config)]


def test_the_groups_are_those_promised() -> None:
    options_of_group = {name: set(group.options) for name, group in GROUPS.items()}
    assert options_of_group == {name: set(options.split()) for name, options in PROMISED.items()}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_can_be_planned(group: str, option: str) -> None:
    # The recipe's sequences are longer than `tiny` reads.
    model = ["model=pythia_160m"] if option == "recipe" else []
    composed = compose([*model, f"{group}={option}"])
    assert composed.choices[group] == option
    own_data = {("data", "hh_local"), ("experiment", "hh_small")}
    expected = "data.preferences=null" if (group, option) in own_data else None
    if (group, option) == ("engine", "trl"):
        expected = "ppo.advantage=gae: TRL has RLOO and GRPO"  # `ppo=rloo` goes with it
    if expected is None:
        assert planned(composed) == []
    else:
        (problem,) = planned(composed)
        assert problem.startswith(expected)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_says_what_it_is(group: str, option: str) -> None:
    assert GROUPS[group].options[option].endswith((".", "12 runs.")), "first comment: a sentence"


def test_no_import_path_in_any_yaml() -> None:
    assert [path for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()] == []


def test_the_default_runs() -> None:
    composed = compose()
    assert config_problems(composed.config) == []
    assert composed.config.stage is StageName.pipeline
    assert composed.config.model.path is None
    assert composed.config.eval.suite is Suite.quick
    assert not composed.multirun


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_small_experiments_run_on_a_bare_machine(name: str) -> None:
    config = compose([f"experiment={name}"]).config
    assert config_problems(config) == []
    assert config.name == name
    assert config.distributed.strategy is StrategyName.single


# The published recipe: per-process batch and rollouts, sequence length, steps, learning rate,
# epochs; 7 training processes.
RECIPE = {
    "hh_125m": (32, 128, 1024, 1500, 8e-6, 4),
    "hh_1b": (8, 64, 1024, 2500, 6e-6, 4),
    "hh_gptj_6b": (4, 64, 512, 6000, 8e-6, 4),
    "hh_gptj_6b_p4d": (4, 64, 512, 6000, 8e-6, 4),
    "hh_20b": (1, 16, 512, 8000, 1e-6, 2),
}


@pytest.mark.parametrize("name", RECIPE)
def test_the_published_recipe(name: str) -> None:
    batch, rollouts, length, steps, rate, epochs = RECIPE[name]
    config = compose([f"experiment={name}"]).config
    ppo, sft = config.ppo, config.sft
    assert (ppo.batch, ppo.rollouts) == (7 * batch, 7 * rollouts)
    assert (ppo.seq_length, ppo.steps, ppo.lr, ppo.epochs) == (length, steps, rate, epochs)
    assert (ppo.train_blocks, ppo.kl.coef, ppo.kl.target, ppo.kl.horizon) == (2, 0.05, 6, 10000)
    assert (ppo.gamma, ppo.lam, ppo.clip_range, ppo.clip_range_value) == (1, 0.95, 0.2, 0.2)
    assert (ppo.reward.scale.name, ppo.reward.clip, ppo.vf_coef) == ("running", 10, 1)
    assert (ppo.betas, ppo.weight_decay, ppo.grad_norm) == ([0.9, 0.95], 1e-6, 1)
    assert (ppo.generation.max_new_tokens, ppo.eval_prompts, ppo.eval_every) == (128, 280, 500)
    assert (ppo.reward.delta, ppo.schedule.name) == (True, "constant")
    assert (sft.seq_length, sft.batch, sft.lr, sft.train_blocks) == (1024, 28, 1e-6, None)
    assert config.distributed.strategy is StrategyName.zero2
    assert config.distributed.processes == 7
    assert config.distributed.precision is PrecisionName.bfloat16
    assert ppo.reward.placement == "gpu:7", "the eighth"


def test_a_pretrained_model_brings_the_recipe_and_the_command_line_wins() -> None:
    assert compose(["model=pythia_1b"]).config.ppo.lr == 8e-6
    config = compose(["model=pythia_1b", "ppo=default", "sft.lr=2e-6"]).config
    assert config.ppo.train_blocks is None
    assert config.sft.lr == 2e-6
    # An experiment's model is overridden without losing the experiment.
    config = compose(["experiment=hh_20b", "model=pythia_160m"]).config
    assert (config.ppo.batch, config.model.name) == (7, "pythia_160m")


def test_stages_share_the_seed_unless_told() -> None:
    config = compose(["seed=5", "ppo.seed=7"]).config
    assert (config.sft.seed, config.reward.seed, config.ppo.seed) == (5, 5, 7)


def test_the_grid_is_a_multirun_of_twelve() -> None:
    composed = compose(["sweep=ppo_grid"])
    assert composed.multirun
    assert composed.config.name == "ppo_grid"
    assert len(composed.sweep) == 3
