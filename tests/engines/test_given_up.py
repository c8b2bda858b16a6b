"""A run that a search gives up, and the weights that a budget of KL selects."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.distributed.world import world_of
from rlhf_exp.engines.native.validation import ValidationSettings
from tests.engines.lab import Evaluations, build_task, run_loop


def test_a_run_ends_after_the_evaluation_at_which_it_is_given_up(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def given_up(step: int, steps: int) -> bool:
        asked.append((step, steps))
        return step == 8

    with world_of("float32", threads=1) as world:
        task = build_task(world)
        task.evaluator = Evaluations(range(9))
        run = run_loop(world, tmp_path, steps=16, task=task, given_up=given_up)
        assert run.outcome is not None
        # Evaluations before training and at every fourth of 16 steps, up to the eighth.
        assert asked == [(0, 16), (4, 16), (8, 16)]
        assert (run.outcome.pruned, run.outcome.last_step) == (True, 8)
        whole = run_loop(world, tmp_path / "whole", steps=8, given_up=lambda step, steps: False)
        assert whole.outcome is not None
        assert (whole.outcome.pruned, whole.outcome.last_step) == (False, 8)


@pytest.mark.parametrize(
    ("budget", "by_wins", "expected"),
    [
        # Reward 3 in units of 2, KL 4: 1.5 - 0.1 * 4 without a budget.
        (None, False, 1.1),
        (4.0, False, 1.5),
        (3.9, False, float("-inf")),
        (None, True, 0.7),
        (4.0, True, 0.7),
        (3.9, True, float("-inf")),
    ],
)
def test_what_is_selected_by(budget: float | None, by_wins: bool, expected: float) -> None:
    settings = ValidationSettings(8, 1.0, 8, 0.1, scaled=True, kl_budget=budget, by_wins=by_wins)
    found = {"eval/reward_mean": 3.0, "eval/kl_sequence": 4.0, "eval/objective": 1.1}
    found["eval/win_rate"] = 0.7
    assert settings.judged(found, 2.0) == pytest.approx(expected)
