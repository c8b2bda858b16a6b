"""The weights that did best on validation so far, kept beside the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_exp.engines.native.checkpoint import load_trainable, trainable_weights


class BestWeights:
    """Files of trainable weights, named after their steps.

    A file stays as long as a kept checkpoint may still name it: a resume from that checkpoint could
    end without finding anything better.

    Args:
        folder: Where the file lives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, module: nn.Module) -> None:
        """Keep the module's trainable weights as those of `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{os.getpid()}"
        save_file(trainable_weights(module), partial)
        partial.rename(self._path(step))

    def prune(self, steps: Collection[int]) -> None:
        """Remove the files of all steps but these."""
        keep = {self._path(step) for step in steps}
        for path in self.folder.glob("step-*.safetensors"):
            if path not in keep:
                path.unlink()

    def restore(self, step: int, module: nn.Module) -> None:
        """Load the best weights, those of `step`, into the module."""
        load_trainable(module, load_file(self._path(step)))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
