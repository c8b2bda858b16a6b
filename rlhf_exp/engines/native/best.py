"""The weights that did best on validation so far, kept beside the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_exp.distributed.world import World


class BestWeights:
    """Files of trainable weights, named after their steps.

    A file stays as long as a kept checkpoint may still name it: a resume from that checkpoint could
    end without finding anything better.

    Args:
        folder: Where the file lives.
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
                partial.rename(self._path(step))

        self.world.together(write)

    def prune(self, steps: Collection[int]) -> None:
        """Remove the files of all steps but these."""
        if not self.world.is_main:
            return
        keep = {self._path(step) for step in steps}
        for path in self.folder.glob("step-*.safetensors"):
            if path not in keep:
                path.unlink()

    def load(self, step: int) -> dict[str, Tensor]:
        """Return the best weights, those of `step`."""
        return load_file(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
