"""What of a run's weights stays: kept steps, and checkpoints until their successors are whole."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.training.result import Interrupted
from rlhf_exp.training.task import Update
from tests.training.lab import build_task, run_loop


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
