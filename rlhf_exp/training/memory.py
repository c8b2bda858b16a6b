"""Memory of this process: in use now, the most so far and of each phase, and where it ran out."""

from __future__ import annotations

import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from rlhf_exp.processes.failures import FailedElsewhere

Phase = Literal[
    "loading", "sampling", "scoring", "assessing", "updating", "evaluating", "checkpointing"
]
"""What a stage does while its memory is watched."""

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: of the GPU where there is one, else resident memory."""
    return device_peak_bytes() if device.type == "cuda" else host_peak_bytes()


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return the peaks of this process so far, in bytes, under the names that are logged.

    Args:
        device: On which the process trains. What it has on other GPUs, such as the reward model's
            own, is added up.
    """
    metrics = {"memory/peak_bytes": float(peak_bytes(device))}
    if device.type == "cuda":
        reserved = max(_watch.reserved, torch.cuda.max_memory_reserved(device))
        metrics["memory/reserved_bytes"] = float(reserved)
        others = [n for n in range(torch.cuda.device_count()) if n != device.index]
        elsewhere = sum(torch.cuda.max_memory_reserved(number) for number in others)
        if elsewhere:
            metrics["memory/other_gpus_bytes"] = float(elsewhere)
    phases = {f"memory/{phase}_bytes": float(peak) for phase, peak in _watch.peaks.items()}
    return metrics | phases


def host_bytes() -> int:
    """Return the resident memory of this process now; 0 where the system does not say."""
    return _of_status("VmRSS") or 0


def host_peak_bytes() -> int:
    """Return the most resident memory of this process since `forget_peaks`, or ever."""
    high_water = _of_status("VmHWM")
    if high_water is not None:
        return high_water
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes where Linux counts kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int:
    """Return the most GPU memory that tensors took since `forget_peaks`; 0 without a GPU."""
    if not torch.cuda.is_initialized():
        return 0
    return max(_watch.allocated, torch.cuda.max_memory_allocated())


def forget_peaks() -> None:
    """Reset the peaks to the memory in use now (of resident memory: on Linux)."""
    with suppress(OSError):
        _RESET.write_text("5\n")  # proc(5): the peak resident set size
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    _watch.forget()


def _of_status(name: str) -> int | None:
    """Return a line of Linux's process status in bytes, if there is one."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Beginnings of torch's messages that say so without the type `torch.OutOfMemoryError`."""


class OutOfMemory(Exception):
    """Memory ran out.

    Attributes:
        phase: What was being done.
        device: Whose memory it was.
        usage: That memory at the time, in words.
    """

    def __init__(self, phase: Phase, device: torch.device, reason: BaseException) -> None:
        super().__init__(str(reason).strip().splitlines()[0] if str(reason) else repr(reason))
        self.phase = phase
        self.device = torch.device("cpu") if _of_host(reason) else _full_device(reason, device)
        self.usage = _usage(self.device)


@contextmanager
def memory_phase(phase: Phase, device: torch.device) -> Iterator[None]:
    """Note the phase's peak, and name the innermost phase if memory runs out inside the block.

    Args:
        phase: What the block does.
        device: On which it does it, unless host memory ran out.

    Raises:
        OutOfMemory: It did.
    """
    with _watch.phase(phase, device):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # What ran out in another process, that one explains.
            if isinstance(error, FailedElsewhere) or not _is_out_of_memory(error):
                raise
            raise OutOfMemory(phase, device, error) from error


class _PhaseWatch:
    """The most memory of each phase so far, without what runs inside it as a phase of its own.

    Of a GPU it is what tensors took, measured afresh in each phase. Resident memory is not measured
    afresh, as that would spoil the peak that the system tells others of the process. So there it is
    the process's peak when the phase last raised it, and a phase that never did has none.

    Attributes:
        peaks: Bytes by phase.
        allocated: The most that tensors took of the GPU before it was measured afresh, bytes.
        reserved: The same of what was reserved.
    """

    def __init__(self) -> None:
        self._running: list[Phase] = []
        self.forget()

    def forget(self) -> None:
        """Forget all peaks."""
        self.peaks: dict[Phase, int] = {}
        self.allocated = self.reserved = 0
        self._host = 0

    @contextmanager
    def phase(self, phase: Phase, device: torch.device) -> Iterator[None]:
        """Note the peak of the block, unless it runs beside the main thread's phases."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._turn(device)
        self._running.append(phase)
        try:
            yield
        finally:
            self._turn(device)
            self._running.pop()

    def _turn(self, device: torch.device) -> None:
        """Give the peak since the last turn to the innermost phase."""
        if device.type == "cuda" and torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated(device)
            self.allocated = max(self.allocated, peak)
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(device))
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak = host_peak_bytes()
            if peak <= self._host:
                return
            self._host = peak
        if self._running:
            phase = self._running[-1]
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak)


_watch = _PhaseWatch()


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(text in str(error) for text in _FULL)


def _full_device(error: BaseException, device: torch.device) -> torch.device:
    """Return the device that an error names: a reward model may have another than the process."""
    named = re.search(r"\bGPU (\d+) has a total capacity", str(error))
    return device if named is None else torch.device("cuda", int(named[1]))


def _of_host(error: BaseException) -> bool:
    """Whether an error of memory that ran out is of host memory."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _usage(device: torch.device) -> str:
    """Return the memory of a device in words."""
    gib = 1 << 30
    if device.type != "cuda":
        return f"this process had {host_bytes() / gib:.1f} GiB of host memory"
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # so full, with what other processes have, that it cannot even be asked
        return f"this process had reserved {reserved / gib:.1f} GiB of it, and it answers no more"
    return (
        f"of its {total / gib:.1f} GiB this process had reserved {reserved / gib:.1f}, "
        f"{allocated / gib:.1f} of it for tensors, and {free / gib:.1f} were free"
    )
