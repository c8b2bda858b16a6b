"""Checkpoints, from which a run resumes exactly, and snapshots of the weights of single steps.

A checkpoint is a folder `step-<n>` that appears by a rename, so it is whole or absent. It holds
only what trains (`trainable.safetensors`), each process's part of the optimizer's state and its
random numbers (`process-<rank>.pt`), the trainer's and the task's own state (`state.json`) and a
digest of each of these; one that does not match its digests is passed over for the one before it.

Snapshots are kept beside the checkpoints: the best weights so far, and those asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.distributed.strategy import OptimizerState
from rlhf_exp.distributed.world import World
from rlhf_exp.store.atomic_files import disk_full_is_user_error

log = logging.getLogger(__name__)

_WEIGHTS, _STATE, _DIGESTS = "trainable.safetensors", "state.json", "digests.json"


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
            torch.save(bundle, partial / _process(world.rank))
            names = [_process(world.rank)]
            if world.is_main:
                save_file(weights, partial / _WEIGHTS)
                (partial / _STATE).write_text(json.dumps(content))
                names += [_WEIGHTS, _STATE]
            for name in names:
                _sync(partial / name)
            return {name: _digest(partial / name) for name in names}

        with disk_full_is_user_error(
            _existing(self.folder),
            f"saving the checkpoint of step {step}",
            needed,
            "Make room and run again: it goes on from the checkpoint before.",
        ):
            world.run_on_all(begin)
            parts = world.run_on_all(write)
            digests = {name: digest for part in parts for name, digest in part.items()}
            return world.run_on_all(lambda: self._publish(step, partial, digests))[world.rank]

    def _publish(self, step: int, partial: Path, digests: Mapping[str, str]) -> Path:
        target = self.folder / f"step-{step:08d}"
        if self.world.is_main:
            (partial / _DIGESTS).write_text(json.dumps(digests))
            _sync(partial / _DIGESTS)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _sync(self.folder)
            for old in self._folders()[: -self.keep]:
                shutil.rmtree(old)
        return target

    def latest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, or `None`; warn of each damaged one."""
        folder = self.world.run_on_all(lambda: self._intact() if self.world.is_main else None)[0]
        return None if folder is None else _read(folder, self.world.rank)

    def _intact(self) -> Path | None:
        """Return the folder of the newest intact checkpoint; set damaged ones aside."""
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in reversed(self._folders()):
            try:
                _check(folder)
                return folder
            except (OSError, ValueError, KeyError) as error:
                log.warning(
                    "checkpoint %s is damaged (%s); falling back to the one before it",
                    folder,
                    error,
                )
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return folder if folder.is_dir() else _existing(folder.parent)


def _process(rank: int) -> str:
    return f"process-{rank}.pt"


def _check(folder: Path) -> None:
    for name, expected in json.loads((folder / _DIGESTS).read_text()).items():
        if _digest(folder / name) != expected:
            raise ValueError(f"{name} does not match its digest")


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
                partial = self.folder / f".partial-{os.getpid()}"
                save_file(weights, partial)
                partial.rename(self.path(step))

        self.world.run_on_all(write)

    def prune(self, steps: Collection[int]) -> None:
        """Remove the files of all steps but these."""
        if not self.world.is_main:
            return
        keep = {self.path(step) for step in steps}
        for path in self.folder.glob("step-*.safetensors"):
            if path not in keep:
                path.unlink()

    def load(self, step: int) -> dict[str, Tensor]:
        """Return the weights of `step`."""
        return load_file(self.path(step))

    def path(self, step: int) -> Path:
        """Return where the weights of `step` are."""
        return self.folder / f"step-{step:08d}.safetensors"
