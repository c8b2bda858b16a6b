"""Memory of this process: in use now, and the most so far."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: of the GPU where there is one, else resident memory."""
    return device_peak_bytes() if device.type == "cuda" else host_peak_bytes()


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
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def forget_peaks() -> None:
    """Reset the peaks to the memory in use now (of resident memory: on Linux)."""
    with suppress(OSError):
        _RESET.write_text("5\n")  # proc(5): the peak resident set size
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _of_status(name: str) -> int | None:
    """Return a line of Linux's process status in bytes, if there is one."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
