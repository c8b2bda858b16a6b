"""The processes that train together, and the device of each.

One class stands between the engines and accelerate: the engines speak of global sums and of their
share of the rows, and a run with one process needs no branch of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Share:
    """This process's rows of a global batch.

    Attributes:
        rows: [n] int64, positions in the global batch; the same n in every process.
        weights: [n] float32, 0 where a row only fills up the share.
    """

    rows: np.ndarray
    weights: np.ndarray


class World:
    """All processes of a run.

    Args:
        accelerator: accelerate's handle on process group, device and mixed precision.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process writes to the store and to the tracker."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    def share(self, rows: int) -> Share:
        """Deal `rows` rows of a global batch out, filling up with zero-weight copies of row 0."""
        each = -(-rows // self.processes)
        dealt = np.arange(self.rank * each, (self.rank + 1) * each)
        weights = (dealt < rows).astype(np.float32)
        return Share(np.where(dealt < rows, dealt, 0), weights)

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over all processes."""
        if self.processes == 1:
            return values
        return self.accelerator.reduce(values, reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """Join `values` [n, ...] of all processes; n may differ."""
        if self.processes == 1:
            return values
        from accelerate.utils import gather_object

        return torch.cat(gather_object([values.cpu()])).to(self.device)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap module and optimizer for the strategy in use."""
        return self.accelerator.prepare(module, optimizer)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this process's part of a *global* mean.

        Data parallelism averages gradients over processes; `loss` is already divided by the global
        count, so the average is turned back into a sum.
        """
        self.accelerator.backward(loss * self.processes)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision of forward passes."""
        return self.accelerator.autocast()


def open_world(precision: Precision, threads: int | None = None) -> World:
    """Join the processes of this run (one, unless a launcher started more).

    Args:
        precision: Number format of matrix products in forward and backward passes.
        threads: CPU threads of this process; `None`: all cores.
    """
    from accelerate import Accelerator

    torch.set_num_threads(threads or os.cpu_count() or 1)
    mixed = "bf16" if precision == "bfloat16" else "no"
    return World(Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed))


def close_world(world: World) -> None:
    """Free what accelerate holds, so that another stage may begin in this process."""
    from accelerate.state import AcceleratorState

    world.accelerator.free_memory()
    AcceleratorState._reset_state()


@contextmanager
def world_of(precision: Precision, threads: int | None = None) -> Iterator[World]:
    """Open a world and close it again."""
    world = open_world(precision, threads)
    try:
        yield world
    finally:
        close_world(world)
