"""The processes that train together: rank, device, global sums, shares of rows, the strategy."""

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
from rlhf_exp.processes.environment import own_gpu, threads_per_process
from rlhf_exp.processes.failures import FailedElsewhere

Precision = Literal["float32", "bfloat16"]
T = TypeVar("T")


@dataclass(frozen=True)
class RowShare:
    """A process's rows of a global batch.

    Attributes:
        rows: [n] int64, row numbers in the global batch; the same n in every process.
        weights: [n] float32, 0 for rows that only fill up the share, else 1.
    """

    rows: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Setup:
    """Strategy, precision and offloading of training.

    Attributes:
        strategy: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        precision: `float32` or `bfloat16`, of matrix products.
        offload: Whether optimizer state and parameters live in host memory.
        shards: Neighbouring processes over which FSDP divides a copy of the weights; `None`: all.
    """

    strategy: str
    precision: str
    offload: bool = False
    shards: int | None = None

    @property
    def deepspeed(self) -> bool:
        """Whether the strategy is one of DeepSpeed's."""
        return self.strategy.startswith("zero")

    @property
    def divides_weights(self) -> bool:
        """Whether each process keeps a part of the weights only."""
        return self.strategy in ("zero3", "fsdp")

    @property
    def bf16_weights(self) -> bool:
        """Whether forward passes use bfloat16 copies of float32 weights."""
        return self.precision == "bfloat16" and self.strategy not in ("single", "ddp")


class World:
    """All processes of a run, as one of them sees them.

    The only class between the training code and process groups: training code works with global
    sums, this process's share of the rows and one module that trains, and needs no branch for a
    run with one process. The process group has been made before by whoever started the processes.

    Attributes:
        device: Device of this process.
        setup: Strategy, precision and offloading of training.
        processes: Number of processes.
        rank: Number of this process, from 0.
        is_main: Whether this process writes to the store and to the tracker.
    """

    def __init__(self, device: torch.device, setup: Setup) -> None:
        grouped = distributed.is_initialized()
        self.device, self.setup = device, setup
        self.processes = distributed.get_world_size() if grouped else 1
        self.rank = distributed.get_rank() if grouped else 0
        self.is_main = self.rank == 0
        self._strategy: Strategy | None = None
        self._exact_frozen: dict[nn.Parameter, Tensor] = {}
        self._object_group: distributed.ProcessGroup | None = None

    def share(self, rows: int, of: int | None = None) -> RowShare:
        """Return a process's equal share of a global batch, filled up with copies of row 0.

        Args:
            rows: Rows of the global batch.
            of: Rank of the process; this one by default.
        """
        rows_each, rank = -(-rows // self.processes), self.rank if of is None else of
        numbers = np.arange(rank * rows_each, (rank + 1) * rows_each)
        weights = (numbers < rows).astype(np.float32)
        return RowShare(np.where(numbers < rows, numbers, 0), weights)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.processes == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate `values` [n, ...] of all processes, by rank; n may differ."""
        if self.processes == 1:
            return values
        return torch.cat(self.all_gather_object(values.detach().cpu())).to(self.device)

    def all_gather_object(self, item: T) -> list[T]:
        """Return every process's `item`, by rank."""
        if self.processes == 1:
            return [item]
        items: list[Any] = [None] * self.processes
        distributed.all_gather_object(items, item, group=self._object_group)
        return items

    def for_thread(self) -> World:
        """Return the same processes for a thread of their own: objects go by another group.

        So what the thread exchanges does not mix with what this one exchanges meanwhile. All
        processes call it.
        """
        other = World(self.device, self.setup)
        if self.processes > 1:
            other._object_group = distributed.new_group(backend="gloo")
        return other

    def broadcast_object(self, item: T) -> T:
        """Return the main process's `item`, for decisions that all must agree on.

        A file that one machine sees, another may not see yet.
        """
        return self.all_gather_object(item)[0]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        return any(self.all_gather_object(flag))

    def run_on_all(self, function: Callable[[], T]) -> list[T]:
        """Call `function` in every process and return all results, by rank.

        Raises:
            FailedElsewhere: It failed in another process. An exception of this process is raised as
                it is. So no process waits for one that is gone.
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
        return [value for value, _ in outcomes]  # type: ignore[misc]

    @property
    def has_weights(self) -> bool:
        """Whether this process loads the weights of models that `prepare` or `place` is given.

        A strategy that divides them takes them from the main process: the others need no host
        memory for the whole.
        """
        return self.is_main or not self.setup.divides_weights

    def place(self, module: nn.Module) -> None:
        """Put a frozen module on the device.

        With a strategy that divides weights each process keeps a part of the decoder blocks, so all
        must call the module equally often.
        """
        if not self.setup.divides_weights:
            module.to(self.device)
            return
        from rlhf_exp.distributed.fsdp import place_frozen

        place_frozen(module, self.device, self.setup.offload, self.setup.shards)

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """Number format that forward passes cast weights to; `None`: the weights' own."""
        return torch.bfloat16 if self.setup.bf16_weights else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of mixed precision, for the prepared module and models beside it."""
        # DeepSpeed computes in bfloat16 without torch's mixed precision.
        by_deepspeed = self._strategy is not None and self.setup.deepspeed
        if self.setup.precision == "float32" or by_deepspeed:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def round_frozen(self, module: nn.Module) -> None:
        """Hold the frozen float32 weights in bfloat16 from now on, if that is how they compute.

        Mixed precision would round those of linear layers at every use; embeddings and norms are
        rounded with them, as by DeepSpeed, so that a frozen trunk computes in bfloat16 throughout.
        Until `release` their exact values are in host memory. DeepSpeed and FSDP have ways of their
        own.
        """
        if self.setup.precision == "float32" or self.setup.strategy not in ("single", "ddp"):
            return
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.dtype == torch.float32:
                self._exact_frozen[parameter] = parameter.detach().cpu()
                parameter.data = parameter.data.to(torch.bfloat16)

    def prepare(
        self,
        module: nn.Module,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        grad_norm: float,
    ) -> nn.Module:
        """Wrap `module` for training over the processes.

        Args:
            module: On any device; its weights need to be in processes with `has_weights` only.
            build_optimizer: Makes the optimizer of the module's trainable parameters.
            grad_norm: L2 norm that gradients are clipped to.

        Returns:
            The module to call for forward passes with gradients.
        """
        self._strategy = strategy_for(self.setup, module, build_optimizer, grad_norm, self.device)
        return self._strategy.wrapped

    @property
    def strategy(self) -> Strategy:
        """The strategy of the prepared module."""
        assert self._strategy is not None, "nothing is prepared"
        return self._strategy

    def micro_batches(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield the micro-batches of an optimizer step, each for a forward and a backward pass.

        Their number must be the same in every process: with sharded parameters processes wait for
        each other in every pass.
        """
        batches = list(parts)
        for number, part in enumerate(batches, start=1):
            if self._strategy is not None:
                self._strategy.begin(last=number == len(batches))
            yield part

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this process's part (0-dim) of a *global* mean.

        Gradients are averaged over processes; `loss` is already divided by the global count, so the
        average is turned back into a sum.
        """
        self.strategy.backward(loss * self.processes)

    def gathered(self) -> AbstractContextManager[None]:
        """Gather the prepared module's parameters, for forward passes without gradients.

        Meanwhile the module itself is called, not the wrapper, and each process may call it any
        number of times.
        """
        return nullcontext() if self._strategy is None else self._strategy.gathered()

    def resume(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """Load what `strategy.weights` and the processes' `strategy.state` returned."""
        self.strategy.load(weights, saved)

    def release(self, weights: Mapping[str, Tensor] | None = None, everywhere: bool = True) -> None:
        """End training: unwrap the module; see `Strategy.release`."""
        self.strategy.release(weights, everywhere)
        self._strategy = None
        for parameter, exact in self._exact_frozen.items():
            parameter.data = exact.to(parameter.device)
        self._exact_frozen = {}


def open_world(
    precision: Precision,
    threads: int | None = None,
    strategy: str = "single",
    offload: bool = False,
    shard_over: str = "all",
) -> World:
    """Return the world of this run's processes (one, without a process group).

    Args:
        precision: Number format of matrix products in forward and backward passes.
        threads: CPU threads of this process; `None`: its part of all cores.
        strategy: Name of the strategy, see `Setup`.
        offload: Whether optimizer state and parameters live in host memory.
        shard_over: `all` processes, or those of a `node`, see `Setup.shards`.

    Raises:
        UserError: The strategy needs more processes than there are, or fewer, or the machines have
            no equal, neighbouring ones.
    """
    single = not distributed.is_initialized()
    if single and strategy != "single":
        raise UserError(
            f"distributed.strategy={strategy}: no processes were started for it; run "
            "distributed=single distributed.processes=1"
        )
    if not single and strategy == "single" and distributed.get_world_size() > 1:
        raise UserError(
            f"distributed=single has one process, and {distributed.get_world_size()} were "
            "started; choose another strategy, such as distributed=ddp"
        )
    local_processes = (
        1 if single else int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))
    )
    torch.set_num_threads(threads_per_process(threads, local_processes))
    shards = None if shard_over == "all" else _shards_of_nodes(local_processes)
    return World(_device(), Setup(strategy, precision, offload, shards))


def _shards_of_nodes(local_processes: int) -> int:
    """Return the number of processes of each machine, after checking that it is the same."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    places: list[Any] = [None] * processes
    distributed.all_gather_object(places, (local_rank, local_processes))
    expected = [(number % local_processes, local_processes) for number in range(processes)]
    if places != expected:
        sizes = sorted({size for _, size in places})
        raise UserError(
            f"distributed.shard_over=node: each machine must have as many processes (found: "
            f"{', '.join(map(str, sizes))}), numbered one after another, as torchrun does and "
            "Slurm with `--distribution=block`; or leave it out"
        )
    return local_processes


@contextmanager
def world_of(
    precision: Precision,
    threads: int | None = None,
    strategy: str = "single",
    offload: bool = False,
    shard_over: str = "all",
) -> Iterator[World]:
    """Yield the world for one stage; the process group stays for the next one."""
    yield open_world(precision, threads, strategy, offload, shard_over)


def _device() -> torch.device:
    """Return this process's device: its GPU on this machine, or the CPU."""
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed if it is installed, which would warn that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", own_gpu(int(os.environ.get("LOCAL_RANK", 0))))
    torch.cuda.set_device(device)
    return device


def strategy_for(
    setup: Setup,
    module: nn.Module,
    build_optimizer: Callable[[], torch.optim.Optimizer],
    grad_norm: float,
    device: torch.device,
) -> Strategy:
    """Return the strategy that `setup` names, over `module` and its new optimizer.

    A strategy's library is imported only if it is used.
    """
    if setup.strategy in ("single", "ddp"):
        from rlhf_exp.distributed.ddp import DataParallel, SingleProcess

        replicated = SingleProcess if setup.strategy == "single" else DataParallel
        return replicated(module, build_optimizer(), grad_norm, device)
    if setup.strategy == "fsdp":
        from rlhf_exp.distributed.fsdp import FullySharded

        half, offload = setup.bf16_weights, setup.offload
        return FullySharded(module, build_optimizer, grad_norm, device, half, offload, setup.shards)
    from rlhf_exp.distributed.deepspeed import Zero, Zero3

    stage = int(setup.strategy.removeprefix("zero"))
    zero = Zero3 if stage == 3 else Zero
    return zero(
        module, build_optimizer, grad_norm, device, setup.bf16_weights, setup.offload, stage
    )
