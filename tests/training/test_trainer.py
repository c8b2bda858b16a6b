"""A run that is extended in the loop: the engine's part of `ppo.continue_from`.

A run that a search gives up, and the weights that a budget of KL selects.

The state in a run's last checkpoint, as it would be if the run went on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from rlhf_exp.config.training import KlConfig, PpoConfig, Schedule, Select, SelectBy
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.training.checkpoint import Snapshots
from rlhf_exp.training.memory import OutOfMemory, memory_phase
from rlhf_exp.training.ppo_objective import selection_score
from rlhf_exp.training.trainer import TrainingProgress, passes
from tests.training.lab import Evaluations, Run, build_task, run_loop


def test_the_best_weights_of_before_the_end_are_still_there(tmp_path: Path) -> None:
    """Four steps an iteration; evaluations at 0 and 8, at the end 12, and when extended at 16, 24.

    The end's is the best of the shorter run, but the longer run has none at 12: step 8's is best.
    """
    with world_of("float32", threads=1) as world:

        def run(folder: str, steps: int, objectives: Sequence[float]) -> Run:
            task = build_task(world)
            task.evaluator = Evaluations(objectives)
            changes = {"schedule": Schedule.constant, "eval_every": 8, "select": Select.best}
            return run_loop(world, tmp_path / folder, steps, task, keep_checkpoints=1, **changes)

        whole = run("whole", 24, [0.0, 5.0, 1.0, 2.0])
        first = run("extended", 12, [0.0, 5.0, 9.0])
        longer = run("extended", 24, [1.0, 2.0])
    assert first.outcome is not None
    assert first.outcome.published_step == 12
    assert longer.outcome is not None
    assert whole.outcome is not None
    assert longer.outcome.published_step == whole.outcome.published_step == 8
    assert longer.outcome.metrics == whole.outcome.metrics
    for name, value in whole.weights.items():
        assert torch.equal(value, longer.weights[name]), name


def test_memory_that_runs_out_while_weights_are_kept_or_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both put the whole model together, and are no part of loading it."""

    def full(*args: Any) -> NoReturn:
        raise MemoryError

    with world_of("float32", threads=1) as world:
        for place, name, select in (
            (Snapshots, "save", Select.best),
            (World, "release", Select.last),
        ):
            task = build_task(world)
            with monkeypatch.context() as patch:
                patch.setattr(place, name, full)
                with pytest.raises(OutOfMemory) as raised, memory_phase("loading", world.device):
                    run_loop(world, tmp_path / name, 4, task, select=select)
            assert raised.value.phase == "checkpointing", name


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
    by = SelectBy.win_rate if by_wins else SelectBy.reward
    section = PpoConfig(kl=KlConfig(coef=0.1, budget=budget), select_by=by)
    found = {"eval/reward_mean": 3.0, "eval/kl_sequence": 4.0, "eval/objective": 1.1}
    found["eval/win_rate"] = 0.7
    assert selection_score(section, found, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "before", "expected"),
    [(4, 0, True), (4, 4, False), (7, 4, False), (9, 4, True), (0, -1, True), (8, 5, True)],
)
def test_multiples_of_four(step: int, before: int, expected: bool) -> None:
    assert passes(step, before, 4) is expected


BEFORE: dict[str, Any] = {
    "step": 6,
    "last_eval": 4,
    "last_checkpoint": 4,
    "best_step": 4,
    "best_objective": 0.5,
    "best_of_checkpoints": [4],
    "published_metrics": {"eval/objective": 0.5},
    "kept": [4],
}
"""Step 6 is done, and nothing after it."""
AFTER = BEFORE | {
    "last_eval": 6,
    "last_checkpoint": 6,
    "best_step": 6,
    "best_objective": 0.75,
    "best_of_checkpoints": [4, 6],
    "published_metrics": {"eval/objective": 0.75},
    "kept": [4, 6],
}
"""The end was evaluated, its weights are the best so far, and they were kept."""


@pytest.mark.parametrize(
    ("eval_every", "keep_every", "stays"),
    [
        # Neither is due at 6 after 4: what a longer run would not have done is undone.
        (4, 4, set()),
        (4, None, set()),
        # An evaluation every 3 steps is due at 6.
        (3, 4, {"last_eval", "best_step", "best_objective", "published_metrics"}),
        (4, 3, {"kept"}),
        (2, 6, {"last_eval", "best_step", "best_objective", "published_metrics", "kept"}),
    ],
)
def test_what_only_the_end_called_for_is_undone(
    eval_every: int, keep_every: int | None, stays: set[str]
) -> None:
    found = TrainingProgress(**AFTER).extended_state(
        TrainingProgress(**BEFORE), eval_every, keep_every
    )
    always = {"last_checkpoint", "best_of_checkpoints"}
    expected = BEFORE | {name: AFTER[name] for name in stays | always}
    assert asdict(found) == expected


def test_a_checkpoint_is_read_as_the_length_of_the_run_says() -> None:
    ended, going_on = TrainingProgress(**AFTER), TrainingProgress(**BEFORE)
    state = json.loads(json.dumps({"step": 6, **ended.state(going_on)}))
    assert TrainingProgress.of(state, 6) == ended, (
        "the same run, killed before its result was whole"
    )
    assert TrainingProgress.of(state, 8) == going_on
    halfway = {"step": 6, **ended.state(None)}
    assert TrainingProgress.of(halfway, 8) == ended


def test_a_copy_is_not_reached_by_later_changes() -> None:
    progress = TrainingProgress(kept=[4], published_metrics={"a": 1.0})
    copied = progress.copy()
    progress.kept.append(8)
    progress.published_metrics["a"] = 0.0
    assert (copied.kept, copied.published_metrics) == ([4], {"a": 1.0})
