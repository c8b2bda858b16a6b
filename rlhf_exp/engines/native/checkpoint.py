"""Checkpoints: everything a stage needs to go on as if it had never stopped.

A checkpoint is a folder `step-<n>` that appears by a rename, so it is whole or absent. It holds
only what trains (`trainable.safetensors`), the optimizer (`optimizer.pt`), the loop's and the
task's own state (`state.json`) and a digest of each of these; one that does not match its digests
is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_exp.store.files import disk_full_is_user_error

log = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.pt", "state.json"
_DIGESTS = "digests.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: Optimizer steps done.
        weights: Trainable tensors by name.
        optimizer: The optimizer's state dict.
        state: What the loop and the task stored, plain JSON values.
        rng: torch's CPU generator state.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    rng: Tensor


def trainable_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors that train, by name, on the CPU."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in module.named_parameters()
        if tensor.requires_grad
    }


def load_trainable(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the module's trainable parameters of the same names.

    Raises:
        ValueError: The names differ.
    """
    targets = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if targets.keys() != weights.keys():
        odd = sorted(targets.keys() ^ weights.keys())[:5]
        raise ValueError(f"weights do not fit the module; they differ in {odd}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


class Checkpoints:
    """The checkpoints of one stage in its staging folder.

    Args:
        folder: Where checkpoints live.
        keep: Number of latest checkpoints kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint atomically and remove those beyond `keep`."""
        needed = 3 * sum(
            p.numel() * p.element_size() for p in module.parameters() if p.requires_grad
        )
        with disk_full_is_user_error(
            _existing(self.folder),
            f"saving the checkpoint of step {step}",
            needed,
            "Make room and run again: it goes on from the checkpoint before.",
        ):
            return self._write(step, module, optimizer, state)

    def _write(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
    ) -> Path:
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(trainable_weights(module), partial / _WEIGHTS)
        bundle = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(bundle, partial / _OPTIMIZER)
        content = {"step": step, "threads": torch.get_num_threads(), **state}
        (partial / _STATE).write_text(json.dumps(content))
        digests = {name: _digest(partial / name) for name in (_WEIGHTS, _OPTIMIZER, _STATE)}
        (partial / _DIGESTS).write_text(json.dumps(digests))
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is intact, or `None`; say so where one is not."""
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in reversed(self._folders()):
            try:
                return _read(folder)
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


def _read(folder: Path) -> Checkpoint:
    digests = json.loads((folder / _DIGESTS).read_text())
    for name, expected in digests.items():
        if _digest(folder / name) != expected:
            raise ValueError(f"{name} does not match its digest")
    state = json.loads((folder / _STATE).read_text())
    bundle = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    return Checkpoint(
        step=state["step"],
        weights=load_file(folder / _WEIGHTS),
        optimizer=bundle["optimizer"],
        state=state,
        rng=bundle["rng"],
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
