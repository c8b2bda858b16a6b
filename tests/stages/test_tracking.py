"""Names of tracked runs that people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.stages.tracking import run_name
from tests.lab import small_config

GIVEN = ("ppo.lr=0.0003", "ppo.kl.coef=0.05", "ppo.seed=1", "sft.lr=2e-5", "sft.seed=7")


@pytest.mark.parametrize(
    ("stage", "more", "name"),
    [
        ("sft", (), "sft lr=2e-5 seed=7"),
        ("ppo", (), "ppo lr=3e-4 kl=0.05 seed=1 sft.lr=2e-5"),
        ("ppo", ("+ppo.clip_range=0.1",), "ppo lr=3e-4 kl=0.05 seed=1 sft.lr=2e-5 clip_range=0.1"),
        # A point's other stages, its name and where it runs say nothing of this stage.
        ("sft", ("name=kl", "distributed=ddp", "reward.lr=0.1"), "sft lr=2e-5 seed=7"),
        ("sft", ("data.path=/home/me/rows.jsonl",), "sft lr=2e-5 seed=7 data.path=rows.jsonl"),
        ("eval", ("eval.prompts=9",), "eval suite=quick seed=0 sft.lr=2e-5 prompts=9"),
    ],
)
def test_the_name_says_what_sets_a_run_apart(
    tmp_path: Path, stage: str, more: tuple[str, ...], name: str
) -> None:
    settings = ("sft.lr=2e-5", *more)
    assert run_name(small_config(tmp_path, *GIVEN), stage, settings) == name


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    settings = tuple(f"ppo.reward.name={'x' * 50}{number}" for number in range(5))
    name = run_name(small_config(tmp_path), "ppo", settings)
    assert name.endswith("xx…")
    assert len(name) == 120
