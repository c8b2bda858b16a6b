"""The limits of this machine: arithmetic by number format, memory bandwidth, memory; measured.

Each measurement takes about half a second. What is measured is what models do: the two linear
layers of a feed-forward part, and reading a block of memory that no cache holds.

D width, F inner width of the feed-forward part.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
"""Names of bfloat16 units in /proc/cpuinfo, of x86 and ARM."""
_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Size of the block that is read: more than caches hold."""
_FLOPS_OF_A_CALL = {"cpu": 4e9, "cuda": 1e12}
"""Most arithmetic of one timed call: 0.1 s of a slow processor, a few ms of a GPU."""


@dataclass(frozen=True)
class MachineLimits:
    """What one device can do.

    Attributes:
        device: Its name.
        flops: Floating-point operations a second of large linear layers, by number format.
        bandwidth: Bytes a second that are read from memory.
        memory: Bytes of memory.
    """

    device: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int


DATA_SHEETS = {
    "a100-40gb": MachineLimits(
        "A100 40 GB", {"float32": 19.5e12, "bfloat16": 312e12}, 1.555e12, 40 * 10**9
    ),
    "a100": MachineLimits(
        "A100 80 GB", {"float32": 19.5e12, "bfloat16": 312e12}, 2.039e12, 80 * 10**9
    ),
    "h100": MachineLimits("H100 SXM", {"float32": 67e12, "bfloat16": 989e12}, 3.35e12, 80 * 10**9),
    "h200": MachineLimits("H200", {"float32": 67e12, "bfloat16": 989e12}, 4.8e12, 141 * 10**9),
}
"""Dense rates of NVIDIA's data sheets (SXM modules), without TF32."""


def machine_limits(device: torch.device, width: int = 1024) -> MachineLimits:
    """Measure a device's limits, in about a second.

    Args:
        device: A CPU or GPU.
        width: D of the linear layers.
    """
    rates = linear_rates(width, 4 * width, device)
    return MachineLimits(device_name(device), rates, memory_bandwidth(device), memory_bytes(device))


def cpu_limits(threads: int, width: int = 1024) -> MachineLimits:
    """Measure the limits of this machine's processor with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return machine_limits(torch.device("cpu"), width)
    finally:
        torch.set_num_threads(before)


def gpu_limits(width: int = 4096) -> MachineLimits | None:
    """Measure the limits of this machine's first GPU; `None` where there is none."""
    return machine_limits(torch.device("cuda", 0), width) if torch.cuda.is_available() else None


def linear_rates(
    width: int, inner: int, device: torch.device, seconds: float = 0.5
) -> dict[str, float]:
    """Measure the FLOP/s of a feed-forward part D -> F -> D in float32 and in bfloat16.

    Its input and output are float32 in either case, as under mixed precision: the casts count, that
    of the weights does not. The formats take turns and the fastest call of each counts, so that a
    busy machine changes their ratio little.

    Args:
        width: D.
        inner: F.
        device: Where to measure.
        seconds: How long.

    Returns:
        FLOP/s by name of the format.
    """
    flops_of_a_row = 4 * width * inner
    rows = int(_FLOPS_OF_A_CALL[device.type] / flops_of_a_row)
    rows = max(64, min(rows, 2048 if device.type == "cpu" else 16384))
    with torch.inference_mode():
        states = torch.randn(rows, width, device=device)
        calls: dict[str, Callable[[], object]] = {}
        for name, dtype in DTYPES.items():
            up = torch.full((inner, width), 0.01, device=device, dtype=dtype)
            down = torch.full((width, inner), 0.01, device=device, dtype=dtype)
            calls[name] = _feed_forward(states, up, down)
        best = _fastest_in_turn(calls, device, seconds)
    return {name: rows * flops_of_a_row / took for name, took in best.items()}


def _feed_forward(
    states: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> Callable[[], object]:
    return lambda: linear(linear(states.to(up.dtype), up), down).to(states.dtype)


def memory_bandwidth(device: torch.device, seconds: float = 0.3) -> float:
    """Measure the bytes a second at which a large block of memory is read."""
    size = _READ_BYTES[device.type]
    with torch.inference_mode():
        block = torch.ones(size // 4, device=device)
        best = _fastest_in_turn({"read": block.sum}, device, seconds)
    return size / best["read"]


def _fastest_in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Return the seconds of each function's fastest call, called in turn for `seconds`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for call in calls.values():  # kernels are chosen and loaded at the first call
        call()
    wait()
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or float("inf") in best.values():
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            wait()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """Return the name of this machine's processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_has_bf16() -> bool | None:
    """Return whether the processor has bfloat16 units; `None` where the system does not say."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    return None if flags is None else not _BF16_FLAGS.isdisjoint(flags.split())


def memory_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpuinfo(name: str) -> str | None:
    with suppress(OSError):
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None
