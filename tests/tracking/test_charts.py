"""Names of metrics on dashboards, and the error without TensorBoard."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.tracking.charts import chart_name, chart_names
from tests.lab import small_config


@pytest.mark.parametrize(
    ("stage", "name", "shown"),
    [
        ("sft", "loss/total", "sft/loss/total"),
        ("reward", "loss/total", "reward/loss/total"),
        ("ppo", "eval/reward_mean", "ppo/eval/reward_mean"),
        ("dpo", "optim/lr", "dpo/optim/lr"),
        ("reward", "reward/accuracy", "reward/reward/accuracy"),
        ("ppo", "reward/mean", "reward/mean"),
        ("ppo", "kl/sequence", "kl/sequence"),
        ("eval", "eval/outcome/wins", "eval/outcome/wins"),
        ("sft", "global_step", "global_step"),
        (None, "loss/total", "loss/total"),
    ],
)
def test_what_several_stages_log_begins_with_the_stage(
    stage: str | None, name: str, shown: str
) -> None:
    assert chart_name(stage, name) == shown
    assert chart_names(stage, {name: 1.0}) == {shown: 1.0}


def test_a_missing_tensorboard_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "rlhf_exp.config.checks.find_spec",
        lambda name: None if name == "tensorboard" else find(name),
    )
    problems = config_problems(small_config(tmp_path, "tracking.also=[tensorboard]"))
    assert ["tracking.also" in str(problem) for problem in problems] == [True]
    assert "pip install tensorboard" in str(problems[0])
    assert config_problems(small_config(tmp_path)) == []
