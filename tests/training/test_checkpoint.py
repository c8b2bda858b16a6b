"""What of a run's weights stays: kept steps, and checkpoints until their successors are whole."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp.config.training import Select
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.errors import UserError
from rlhf_exp.training.ppo import PpoTask
from rlhf_exp.training.result import Interrupted
from rlhf_exp.training.task import Update
from tests.training.lab import Evaluations, build_task, run_loop


@pytest.fixture
def world() -> Iterator[World]:
    with world_of("float32", threads=1) as opened:
        yield opened


def test_weights_of_every_nth_step_are_kept_and_those_of_lost_steps_are_not(
    world: World, tmp_path: Path
) -> None:
    """Cut off at step 9 with weights kept at 8 that the last checkpoint, of step 4, knows not."""

    class Killed(Exception):
        pass

    task = build_task(world)
    iterate = task.iterate

    def dying(iteration: int, update: Update) -> None:
        steps = itertools.count(iteration * task.updates)

        def counted(losses: Iterable[Tensor]) -> None:
            if next(steps) == 9:
                shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
                raise Killed
            update(losses)

        iterate(iteration, counted)

    task.iterate = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run_loop(world, tmp_path, task=task, keep_every=4)
    lost = tmp_path / "kept" / "step-00000008.safetensors"
    assert lost.is_file()
    with pytest.raises(Interrupted):
        run_loop(world, tmp_path, steps=16, keep_every=100, interrupted=lambda: True)
    assert not lost.exists()
    run = run_loop(world, tmp_path, keep_every=4, keep_checkpoints=9)
    assert run.outcome is not None
    assert sorted(run.outcome.kept) == [4, 12]
    for step, path in run.outcome.kept.items():
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        assert path.read_bytes() == (folder / "trainable.safetensors").read_bytes()


def test_a_checkpoint_goes_only_when_its_successor_is_whole(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint kept, a kill before the rename of the second leaves the first."""

    class Killed(Exception):
        pass

    def killed(path: Path, target: Path) -> None:
        if target.name == "step-00000008":
            raise Killed
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        run_loop(world, tmp_path, keep_checkpoints=1)
    monkeypatch.undo()
    again = run_loop(world, tmp_path, keep_checkpoints=1)
    assert again.outcome is not None
    assert again.outcome.steps_run == 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def task_with(world: World, *objectives: float) -> PpoTask:
    """Return a task whose evaluations come to these objectives, in order."""
    task = build_task(world)
    task.evaluator = Evaluations(objectives)
    return task


@pytest.mark.parametrize("damage", ["flipped", "empty", "missing"])
def test_damaged_best_weights_are_made_again_from_the_checkpoint_before(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Evaluated at steps 0, 4, 8 and 12; of step 8's weights the checkpoint of step 4 knows not."""
    whole = run_loop(
        world, tmp_path / "whole", task=task_with(world, 0, 1, 5, 2), select=Select.best
    )
    folder, interrupted = tmp_path / "damaged", iter([False, True])
    with pytest.raises(Interrupted):
        run_loop(
            world,
            folder,
            task=task_with(world, 0, 1, 5),
            select=Select.best,
            interrupted=lambda: next(interrupted),
        )
    best = folder / "best" / "step-00000008.safetensors"
    if damage == "flipped":
        flip(best)
    elif damage == "empty":
        best.write_bytes(b"")
    else:
        best.unlink()
    with caplog.at_level(logging.WARNING):
        again = run_loop(world, folder, task=task_with(world, 5, 2), select=Select.best)
    assert (
        f"step-00000008 is damaged ({'[Errno 2]' if damage == 'missing' else best}" in caplog.text
    )
    assert again.outcome is not None
    assert (again.outcome.steps_run, again.outcome.published_step) == (8, 8)
    assert again.weights.keys() == whole.weights.keys()
    for name, values in again.weights.items():
        assert torch.equal(values, whole.weights[name]), name


def test_best_weights_that_are_damaged_while_training_goes_on_are_not_published(
    world: World, tmp_path: Path
) -> None:
    task = task_with(world, 0, 5, 1, 2)
    iterate = task.iterate

    def damaging(iteration: int, update: Update) -> None:
        iterate(iteration, update)
        for path in (tmp_path / "best").glob("step-00000004.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    task.iterate = damaging  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"weights kept of step 4 are damaged: .*\.safetensors"):
        run_loop(world, tmp_path, task=task, select=Select.best, checkpoint_every=99)


@pytest.mark.parametrize(
    ("name", "content"),
    [("digests.json", b"[]"), ("digests.json", b"{}"), ("state.json", b""), ("process-0.pt", None)],
)
def test_a_damaged_checkpoint_is_passed_over(
    world: World, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Two are kept, of steps 8 and 12; without the second, four steps are done again."""
    run_loop(world, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000012" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    again = run_loop(world, tmp_path)
    assert again.outcome is not None
    assert again.outcome.steps_run == 4
