"""Graphs of decode steps: a step's kernels are launched at once, not one by one.

A decode step launches a thousand small kernels, which takes the host longer than the GPU computes.
So a step is recorded as a CUDA graph after the first one of its number of rows and columns, and
replayed from then on. A replay reads and writes the memory that was recorded: all that a step
keeps for the next one stays at fixed addresses (`DecodeLoop`).

Nothing is taken on trust: the first replay of a shape is compared with the step as it is. Where
they differ, or a step cannot be recorded (its host waits for the device, as mixtures of experts
do), a model is decoded without graphs, after one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - there is no public one

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Largest difference of log-probabilities between a replay and the step as it is, in nats."""

Shape = tuple[int, int]
"""Rows and columns of a step."""
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Recorder(Protocol):
    """Records what a function has a device do."""

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """Do `step` once and record it; return what does it again, on the same memory.

        Raises:
            RuntimeError: it cannot be recorded; it may have been done in part.
        """


class CudaRecorder:
    """Records CUDA graphs, whose intermediate results share memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """See `Recorder`."""
        # What would spoil a recording is found before, and kernels are loaded outside of it.
        with NoWaits():
            step()
        # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache.
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads (of a progress display, of W&B) may call CUDA meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


class NoWaits(TorchDispatchMode):
    """Raises where the host would wait for the device, in this thread.

    torch's own mode (`set_sync_debug_mode`) is one of all threads: those that train or score
    meanwhile may wait.
    """

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operation of torch
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Do an operation.

        Raises:
            RuntimeError: Its results are numbers of the device's that the host has to know.
        """
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            raise RuntimeError(f"{func.name()} waits for the device")
        return func(*args, **kwargs)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ANN401
    name = func._schema.name.partition("::")[2]
    if name in _INDEXING:  # by numbers its result has a size that is known
        dtypes = {index.dtype for index in args[1] if isinstance(index, Tensor)}
        return bool(dtypes & {torch.bool, torch.uint8})
    if name == "_to_copy":
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        return to_host and args[0].device.type != "cpu" and not kwargs.get("non_blocking")
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


@dataclass
class _Experience:
    """What is known of a model: shapes whose replay was right, and whether it is left alone."""

    checked: set[Shape] = field(default_factory=set)
    refused: bool = False


_EXPERIENCE: WeakKeyDictionary[nn.Module, _Experience] = WeakKeyDictionary()


class StepGraphs:
    """The graphs of one sampling call.

    Args:
        model: what is decoded.
        state: int64; a step takes it from one state to the next, and reads no other that it
            changes, but for what it writes anew.
        logprobs: float32, where steps write log-probabilities.
        recorder: records steps.
    """

    def __init__(
        self, model: nn.Module, state: Tensor, logprobs: Tensor, recorder: Recorder
    ) -> None:
        self._experience = _EXPERIENCE.setdefault(model, _Experience())
        self._state, self._logprobs, self._recorder = state, logprobs, recorder
        self._replays: dict[Shape, Callable[[], object]] = {}

    def run(self, shape: Shape, step: Callable[[], object]) -> None:
        """Do a step once, by a graph if there can be one.

        Args:
            shape: rows and columns; the step's work is a function of them and of fixed memory.
            step: does it.
        """
        replay = self._replays.get(shape)
        if replay is not None:
            replay()
            return
        if self._experience.refused:
            step()
            return
        before = self._state.clone()
        try:
            replay = self._recorder.record(step)
        except RuntimeError as error:
            self._refuse(f"cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}")
        else:
            if shape in self._experience.checked or self._agrees(before, replay):
                self._experience.checked.add(shape)
                self._replays[shape] = replay
                return
            self._refuse("gives other tokens by a CUDA graph than without")
        self._state.copy_(before)
        step()

    def _agrees(self, before: Tensor, replay: Callable[[], object]) -> bool:
        """Return whether a replay from the state `before` does what the step has done."""
        state, logprobs = self._state.clone(), self._logprobs.clone()
        self._state.copy_(before)
        replay()
        return torch.equal(self._state, state) and torch.allclose(
            self._logprobs, logprobs, rtol=0.0, atol=TOLERANCE, equal_nan=True
        )

    def _refuse(self, reason: str) -> None:
        self._experience.refused = True
        self._replays.clear()
        log.warning(
            "a decode step %s. Sampling goes on without graphs: right, but slower on a GPU", reason
        )
