"""Checkpoints, from which a run resumes exactly, and snapshots of the weights of single steps.

A checkpoint is a folder `step-<n>` that appears by a rename, so it is whole or absent. It holds
only what trains (`trainable.safetensors`), each process's part of the optimizer's state and its
random numbers (`process-<rank>.pt`), the trainer's and the task's own state (`state.json`) and a
digest of each of these; one that does not match its digests is passed over for the one before it.

Snapshots are kept beside the checkpoints: the best weights so far, and those asked for. Each has
its digest beside it, and a checkpoint that refers to a damaged one is passed over as well: going on
from the one before makes it again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.distributed.strategy import OptimizerState
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import disk_full_is_user_error, sync
from rlhf_exp.store.sealed import (
    Damaged,
    check_sealed_file,
    check_sealed_folder,
    digest_path,
    file_digest,
    seal_file,
    seal_folder,
)

log = logging.getLogger(__name__)

_WEIGHTS, _STATE = "trainable.safetensors", "state.json"
_REMEDY = "Make room and run again: it goes on from the checkpoint before."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: Optimizer steps done.
        weights: Trainable tensors by name.
        optimizer: The optimizer's state, in the files of the processes that wrote it.
        state: Of the trainer and the task, plain JSON values.
        rng: State of torch's CPU generator of this process.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]
    rng: Tensor


class Checkpoints:
    """The checkpoints of one stage in its staging folder, which all processes see.

    Args:
        folder: Where checkpoints live.
        keep: Number of latest checkpoints kept.
        world: The processes, and what they train.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder = folder
        self.keep = keep
        self.world = world

    def save(self, step: int, state: Mapping[str, Any], before_write: Callable[[], None]) -> Path:
        """Write a checkpoint atomically and remove those beyond `keep`.

        Args:
            step: Optimizer steps done.
            state: Of the trainer and the task, plain JSON values.
            before_write: Raises if this run may no longer write.
        """
        world, strategy = self.world, self.world.strategy
        weights = strategy.weights()
        content = {"step": step, "threads": torch.get_num_threads(), **state}
        content |= {"layout": strategy.layout, "processes": world.processes}
        needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        partial = self.folder / f".partial-{world.broadcast_object(os.getpid())}"

        def begin() -> None:
            if world.is_main:
                before_write()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write() -> dict[str, str]:
            bundle = {"optimizer": strategy.state(), "rng": torch.get_rng_state()}
            # Given a path, torch hides the reason why it cannot write.
            with (partial / _process(world.rank)).open("wb") as file:
                torch.save(bundle, file)
            names = [_process(world.rank)]
            if world.is_main:
                save_file(weights, partial / _WEIGHTS)
                (partial / _STATE).write_text(json.dumps(content))
                names += [_WEIGHTS, _STATE]
            for name in names:
                sync(partial / name)
            return {name: file_digest(partial / name) for name in names}

        with disk_full_is_user_error(
            self.folder, f"saving the checkpoint of step {step}", needed, _REMEDY
        ):
            try:
                world.run_on_all(begin)
                parts = world.run_on_all(write)
                digests = {name: digest for part in parts for name, digest in part.items()}
                return world.run_on_all(lambda: self._publish(step, partial, digests))[world.rank]
            finally:
                # A full disk has no room for half a checkpoint.
                if world.is_main:
                    shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, step: int, partial: Path, digests: Mapping[str, str]) -> Path:
        target = self.folder / f"step-{step:08d}"
        if self.world.is_main:
            seal_folder(partial, digests)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync(self.folder)
            for old in self._folders()[: -self.keep]:
                shutil.rmtree(old)
        return target

    def latest(
        self, snapshots: Callable[[Mapping[str, Any]], Iterable[Path]] = lambda state: ()
    ) -> Checkpoint | None:
        """Return the newest intact checkpoint, or `None`; warn of each damaged one.

        Args:
            snapshots: Returns the files of `Snapshots` that a checkpoint's state refers to.
        """

        def find() -> Path | None:
            return self._intact(snapshots) if self.world.is_main else None

        folder = self.world.run_on_all(find)[0]
        return None if folder is None else _read(folder, self.world.rank)

    def _intact(self, snapshots: Callable[[Mapping[str, Any]], Iterable[Path]]) -> Path | None:
        """Return the folder of the newest intact checkpoint; set damaged ones aside."""
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in reversed(self._folders()):
            try:
                for path in snapshots(_checked_state(folder)):
                    _check_snapshot(path)
                return folder
            except (OSError, Damaged) as error:
                log.warning(
                    "checkpoint %s is damaged (%s); falling back to the one before it, or to the "
                    "beginning",
                    folder,
                    error,
                )
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _process(rank: int) -> str:
    return f"process-{rank}.pt"


def _checked_state(folder: Path) -> dict[str, Any]:
    """Return the state in a checkpoint all of whose files are there as they were written."""
    names = check_sealed_folder(folder)
    if _STATE not in names:
        raise Damaged(f"{folder}: no {_STATE} among its digests")
    state: dict[str, Any] = json.loads((folder / _STATE).read_text())
    for name in (_WEIGHTS, *map(_process, range(state["processes"]))):
        if name not in names:
            raise Damaged(f"{folder}: no {name} among its digests")
    return state


def _read(folder: Path, rank: int) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text())
    processes = state["processes"]

    def bundle(number: int) -> dict[str, Any]:
        return torch.load(folder / _process(number), map_location="cpu", weights_only=True)

    return Checkpoint(
        step=state["step"],
        weights=load_file(folder / _WEIGHTS),
        optimizer=OptimizerState(
            state["layout"], processes, lambda number: bundle(number)["optimizer"]
        ),
        state=state,
        rng=bundle(min(rank, processes - 1))["rng"],
    )


class Snapshots:
    """Files of trainable weights, named after their steps.

    Args:
        folder: Where the files live.
        world: The processes, and what they train.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world

    def save(self, step: int, before_write: Callable[[], None]) -> None:
        """Keep the trainable weights of `step`; `before_write` raises if this run no longer may."""
        weights = self.world.strategy.weights()

        def write() -> None:
            if self.world.is_main:
                before_write()
                self.folder.mkdir(parents=True, exist_ok=True)
                with seal_file(self.path(step)) as draft:
                    save_file(weights, draft)

        needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        work = f"keeping the weights of step {step}"
        with disk_full_is_user_error(self.folder, work, needed, _REMEDY):
            self.world.run_on_all(write)

    def prune(self, steps: Collection[int]) -> None:
        """Remove the files of all steps but these."""
        if not self.world.is_main:
            return
        keep = {self.path(step) for step in steps}
        for path in self.folder.glob("step-*.safetensors"):
            if path not in keep:
                path.unlink()
                digest_path(path).unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, Tensor]:
        """Return the weights of `step`.

        Raises:
            UserError: They are missing or damaged.
        """
        return load_file(self.checked_path(step, needed=True))

    def checked_path(self, step: int, needed: bool = False) -> Path:
        """Return where the weights of `step` are, if they are as they were written.

        Args:
            step: Of the weights.
            needed: Whether they must be there.

        Raises:
            UserError: They are damaged, or missing and needed.
        """
        path = self.path(step)
        try:
            if needed or path.exists():
                _check_snapshot(path)
        except (OSError, Damaged) as error:
            raise UserError(
                f"the weights kept of step {step} are damaged: {error}. Run the same command "
                "again: it goes on from a checkpoint before them, and makes them again"
            ) from error
        return path

    def path(self, step: int) -> Path:
        """Return where the weights of `step` are."""
        return self.folder / f"step-{step:08d}.safetensors"


def _check_snapshot(path: Path) -> None:
    """Raise unless a snapshot is as it was written; one of an earlier version has no digest."""
    if digest_path(path).exists() or not path.exists():
        check_sealed_file(path)
