"""The processes that train together, and the device of each.

One class stands between the engines and process groups: the engines speak of global sums, of their
share of the rows and of one module that trains, and a run with one process needs no branch of its
own. Who starts the processes has made the process group before; a run without one is alone.

From a strategy's name to the strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from rlhf_exp.distributed.strategy import OptimizerState, Strategy
from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import threads_each
from rlhf_exp.processes.failures import FailedElsewhere

Precision = Literal["float32", "bfloat16"]
T = TypeVar("T")


@dataclass(frozen=True)
class RowShare:
    """This process's rows of a global batch.

    Attributes:
        rows: [n] int64, positions in the global batch; the same n in every process.
        weights: [n] float32, 0 where a row only fills up the share.
    """

    rows: np.ndarray
    weights: np.ndarray


class World:
    """All processes of a run.

    Attributes:
        device: Of this process.
        setup: How what trains is spread over the processes.
        processes: How many there are.
        rank: Number of this process.
        is_main: Whether this process writes to the store and to the tracker.
    """

    def __init__(self, device: torch.device, setup: Setup) -> None:
        together = distributed.is_initialized()
        self.device, self.setup = device, setup
        self.processes = distributed.get_world_size() if together else 1
        self.rank = distributed.get_rank() if together else 0
        self.is_main = self.rank == 0
        self._strategy: Strategy | None = None

    def share(self, rows: int, of: int | None = None) -> RowShare:
        """Deal `rows` rows of a global batch out, filling up with zero-weight copies of row 0.

        Args:
            rows: How many.
            of: The process whose share is meant; this one by default.
        """
        each, rank = -(-rows // self.processes), self.rank if of is None else of
        dealt = np.arange(rank * each, (rank + 1) * each)
        weights = (dealt < rows).astype(np.float32)
        return RowShare(np.where(dealt < rows, dealt, 0), weights)

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over all processes."""
        if self.processes == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Join `values` [n, ...] of all processes; n may differ."""
        if self.processes == 1:
            return values
        return torch.cat(self.all_gather_object(values.detach().cpu())).to(self.device)

    def all_gather_object(self, item: T) -> list[T]:
        """Return every process's `item`, by rank."""
        if self.processes == 1:
            return [item]
        items: list[Any] = [None] * self.processes
        distributed.all_gather_object(items, item)
        return items

    def broadcast_object(self, item: T) -> T:
        """Return the main process's `item`: what one machine sees, another may not see yet."""
        return self.all_gather_object(item)[0]

    def any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        return any(self.all_gather_object(flag))

    def run_on_all(self, function: Callable[[], T]) -> list[T]:
        """Call `function` in every process and return all results, by rank.

        Raises:
            FailedElsewhere: It failed in another process; what it raised here is raised as it is.
                So no process waits for one that is gone.
        """
        if self.processes == 1:
            return [function()]
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        outcomes = self.all_gather_object((result, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, reason) in enumerate(outcomes):
            if reason is not None:
                raise FailedElsewhere(f"process {rank} failed: {reason}")
        return [found for found, _ in outcomes]  # type: ignore[misc]

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """Number format that the strategy computes in, whatever the weights' own; else `None`."""
        return torch.bfloat16 if self.setup.half_weights else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of the prepared module and of what is compared with it."""
        # DeepSpeed computes in bfloat16 without torch's mixed precision.
        deep = self._strategy is not None and self.setup.deepspeed
        if self.setup.precision == "float32" or deep:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def prepare(
        self, module: nn.Module, build: Callable[[], torch.optim.Optimizer], grad_norm: float
    ) -> nn.Module:
        """Spread what trains of `module` over the processes.

        Args:
            module: On this process's device.
            build: Makes the optimizer of the module's trainable parameters.
            grad_norm: L2 norm that gradients are clipped to.

        Returns:
            What forward passes with gradients go through.
        """
        self._strategy = strategy_for(self.setup, module, build, grad_norm, self.device)
        return self._strategy.wrapped

    @property
    def strategy(self) -> Strategy:
        """How the prepared module trains."""
        assert self._strategy is not None, "nothing is prepared"
        return self._strategy

    def micro_batches(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield the micro-batches of an optimizer step, each for a forward and a backward pass.

        Their number must be the same in every process: with sharded parameters processes wait for
        each other in every pass.
        """
        every = list(parts)
        for number, part in enumerate(every, start=1):
            if self._strategy is not None:
                self._strategy.begin(last=number == len(every))
            yield part

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this process's part (0-dim) of a *global* mean.

        Gradients are averaged over processes; `loss` is already divided by the global count, so the
        average is turned back into a sum.
        """
        self.strategy.backward(loss * self.processes)

    def gathered(self) -> AbstractContextManager[None]:
        """Hold the prepared module's parameters whole, for many forward passes without gradients.

        Meanwhile the module itself is called, not the wrapper, as often as a process likes.
        """
        return nullcontext() if self._strategy is None else self._strategy.gathered()

    def resume(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """Take back what `strategy.weights` and the processes' `strategy.state` returned."""
        self.strategy.load(weights, saved)

    def release(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """End training: every process has the plain module whole again, with `weights` if given."""
        self.strategy.release(weights)
        self._strategy = None


def open_world(
    precision: Precision,
    threads: int | None = None,
    strategy: str = "single",
    offload: bool = False,
) -> World:
    """Join the processes of this run (one, where no process group was made).

    Args:
        precision: Number format of matrix products in forward and backward passes.
        threads: CPU threads of this process; `None`: its part of all cores.
        strategy: How what trains is spread over the processes.
        offload: Whether optimizer state and parameters live in host memory.
    """
    alone = not distributed.is_initialized()
    if alone and strategy != "single":
        raise UserError(
            f"distributed.strategy={strategy}: no processes were started for it; run "
            "distributed=single distributed.processes=1"
        )
    if not alone and strategy == "single" and distributed.get_world_size() > 1:
        raise UserError(
            f"distributed=single has one process, and {distributed.get_world_size()} were "
            "started; choose another strategy, such as distributed=ddp"
        )
    local = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))
    torch.set_num_threads(threads_each(threads, local))
    return World(_device(), Setup(strategy, precision, offload))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed where it finds it, which would warn that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def world_of(
    precision: Precision,
    threads: int | None = None,
    strategy: str = "single",
    offload: bool = False,
) -> Iterator[World]:
    """Open a world for one stage; the process group stays for the next one."""
    yield open_world(precision, threads, strategy, offload)


@dataclass(frozen=True)
class Setup:
    """How what trains is spread over the processes.

    Attributes:
        strategy: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        precision: `float32` or `bfloat16`, of matrix products.
        offload: Whether optimizer state and parameters live in host memory.
    """

    strategy: str
    precision: str
    offload: bool = False

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed does it."""
        return self.strategy.startswith("zero")

    @property
    def half_weights(self) -> bool:
        """Whether forward passes see bfloat16 weights, with float32 ones behind them."""
        return self.precision == "bfloat16" and self.strategy not in ("single", "ddp")


def strategy_for(
    setup: Setup,
    module: nn.Module,
    build: Callable[[], torch.optim.Optimizer],
    grad_norm: float,
    device: torch.device,
) -> Strategy:
    """Return the strategy that `setup` names, over `module` and the optimizer that `build` makes.

    Libraries are imported only where they are asked for.
    """
    if setup.strategy in ("single", "ddp"):
        from rlhf_exp.distributed.ddp import DataParallel, SingleProcess

        whole = SingleProcess if setup.strategy == "single" else DataParallel
        return whole(module, build(), grad_norm, device)
    if setup.strategy == "fsdp":
        from rlhf_exp.distributed.fsdp import FullySharded

        return FullySharded(module, build, grad_norm, device, setup.half_weights, setup.offload)
    from rlhf_exp.distributed.deepspeed import Zero, Zero3

    stage = int(setup.strategy.removeprefix("zero"))
    kind = Zero3 if stage == 3 else Zero
    return kind(module, build(), grad_norm, device, setup.half_weights, setup.offload, stage)
