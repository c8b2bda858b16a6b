"""docs/how-to/recipe.md: its commands compose and plan, its table holds what the recipe has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_exp.cli import parser
from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.compose import compose, to_dict
from rlhf_exp.pipeline.memory_fit import fits_of
from rlhf_exp.pipeline.plan import StepState, plan
from rlhf_exp.pipeline.plan_table import fits, shape_for, stage_memory, trained_stages

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "recipe.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`((?:python launch\.py|rlhf-exp) [^`]+)`", PAGE)
LAUNCHES = [command for command in COMMANDS if command.startswith("python")]
TABLE = PAGE.partition("<!-- table: recipe -->")[2].partition("<!-- table: end -->")[0]
ROWS = [
    [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
    for line in TABLE.strip().splitlines()[2:]
]


def test_there_is_a_command_for_each_step() -> None:
    assert len(LAUNCHES) == 6
    assert len(COMMANDS) >= 11


@pytest.mark.parametrize("command", LAUNCHES)
def test_a_command_composes_and_plans_and_fits_the_published_machine(
    command: str, tmp_path: Path
) -> None:
    overrides = [*shlex.split(command)[2:], f"output_dir={tmp_path}", "plan=true"]
    config = compose(overrides).config
    assert not config_problems(config)
    steps = {step.stage: step for step in plan(config)}
    if "reward=published" in command:
        assert steps["reward"].state is StepState.given
        assert steps["reward"].model == "Dahoas/gptj-rm-static@676bfd4d"
    shape = shape_for(config.model)
    assert shape is not None
    for stage in trained_stages(config):
        assert fits(stage_memory(config, stage, shape), 40), stage
    assert {fit.size for fit in fits_of(config)} <= {24}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in LAUNCHES])
def test_other_commands_parse(command: str) -> None:
    parser().parse_args(shlex.split(command)[1:])


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return to_dict(compose(["experiment=hh_gptj_6b"]).config)


@pytest.mark.parametrize(("theirs", "key", "ours"), [row[1:] for row in ROWS])
def test_a_value_is_the_recipes(theirs: str, key: str, ours: str, recipe: dict[str, Any]) -> None:
    value: Any = recipe
    for name in key.split("."):
        value = value[name]
    # YAML reads 1e-06 as a text: numbers are compared as such.
    said = yaml.safe_load(ours)
    assert value == (float(said) if isinstance(value, float) else said)
    number = re.fullmatch(r"([\d.e-]+)(?: × (\d+))?", theirs)
    if number is not None and not isinstance(value, str):
        assert float(number[1]) * float(number[2] or 1) == value
    pair = re.fullmatch(r"\(([\d.]+), ([\d.]+)\)", theirs)
    if pair is not None:
        assert [float(pair[1]), float(pair[2])] == value


def test_no_value_of_the_recipe_is_left_out() -> None:
    """Every value that the experiment and its `recipe` options set stands in the table."""
    conf = Path(__file__).parents[2] / "conf"
    told = {key for _, _, key, _ in ROWS}
    others = {"micro_batch", "checkpoint_every", "epochs", "schedule"}  # no result's, or with lr
    for stage in ("sft", "ppo"):
        content = yaml.safe_load((conf / stage / "recipe.yaml").read_text())
        content |= yaml.safe_load((conf / "experiment" / "hh_gptj_6b.yaml").read_text())[stage]
        for key in flat(stage, content):
            name = key.rpartition(".")[2]
            assert key in told or name in others or (stage == "sft" and name == "eval_every"), key


def flat(prefix: str, content: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in content.items():
        key = f"{prefix}.{name}"
        found += flat(key, value) if isinstance(value, dict) else [key]
    return found
