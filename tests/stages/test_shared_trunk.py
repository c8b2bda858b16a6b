"""PPO with a reward model that has the policy's trunk: the same run, the trunk computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.stages import ppo
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.training.reward_scorer import SharedTrunkScorer
from tests.lab import artifact, run

ARGUMENTS = ("stage=ppo", "reward.train_blocks=1", "ppo.train_blocks=1", "ppo.steps=4")


def rows(outputs: Path) -> list[dict[str, float]]:
    lines = (artifact(outputs, "ppo").path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_same_run_as_with_a_reward_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    of_states = SharedTrunkScorer.of_states

    def noted(self: SharedTrunkScorer, *arguments: Any) -> Any:
        scored.append(len(arguments[0]))
        return of_states(self, *arguments)

    monkeypatch.setattr(SharedTrunkScorer, "of_states", noted)
    run(tmp_path / "shared", *ARGUMENTS)
    assert scored == [8, 8], "two iterations of 8 rollouts"

    monkeypatch.setattr(ppo, "training_scorer", lambda *given: scorer_for(*given[:4]))
    run(tmp_path / "apart", *ARGUMENTS)
    assert scored == [8, 8]
    shared, apart = rows(tmp_path / "shared"), rows(tmp_path / "apart")
    assert len(shared) == len(apart)
    compared = ("reward/mean", "reward/std", "loss/total", "eval/reward_mean", "kl/sequence")
    for one, other in zip(shared, apart, strict=True):
        for name in compared:
            if name in other:
                assert one[name] == pytest.approx(other[name], abs=2e-4), name


@pytest.mark.parametrize(
    ("more", "shared"),
    [
        (("reward.train_blocks=null",), False),
        (("ppo.gradient_checkpointing=true",), False),
        (("ppo.reward.placement=cpu",), False),
        (("distributed.precision=bfloat16",), True),
    ],
)
def test_where_it_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], shared: bool
) -> None:
    found: list[bool] = []
    make = ppo.training_scorer

    def noted(*arguments: Any) -> Any:
        scorer = make(*arguments)
        found.append(isinstance(scorer, SharedTrunkScorer))
        return scorer

    monkeypatch.setattr(ppo, "training_scorer", noted)
    run(tmp_path, *ARGUMENTS, "ppo.steps=2", *more)
    assert found == [shared]
