"""Weights of single steps, kept beside the checkpoints: the best so far, and those asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.distributed.world import World


@dataclass(frozen=True)
class Keep:
    """Which weights outlast training, beside those that are published.

    Attributes:
        every: Optimizer steps between them; `None`: none.
        best: Those best on validation.
        last: Those of the last step.
    """

    every: int | None = None
    best: bool = False
    last: bool = False


class KeptWeights:
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

        self.world.together(write)

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
