"""Memory of this process: in use, and the most so far.

What a few iterations cost: time and peak memory of each phase, as a tracker sees them.

The loop reports to its tracker at the end of each phase: the evaluation before training, each
iteration, the evaluation after them, and, after the checkpoint and with the module whole again, the
summary. So it is measured as it runs, without knowing.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    found = _of_status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes where Linux counts kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int:
    """Return the most GPU memory that tensors took since `forget_peaks`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def forget_peaks() -> None:
    """Let the peaks begin again at what is in use now (of resident memory: on Linux)."""
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


ITERATIONS = {"sft": 4, "reward": 4, "ppo": 2}
"""Iterations of a stage that are run; of SFT and the reward model, each is an optimizer step."""

START, ITERATION, EVALUATION, END = "start", "iteration", "evaluation", "end"


@dataclass(frozen=True)
class Phase:
    """One phase of a process.

    Attributes:
        name: `start` (loading and the first evaluation), `iteration`, `evaluation`, or `end`
            (checkpoint, and the module whole again).
        seconds: Wall-clock time; of `start` without the loading of models and data.
        host: Most resident memory, bytes.
        device: Most GPU memory that tensors took, bytes; 0 without a GPU.
        metrics: What the loop reported.
    """

    name: str
    seconds: float
    host: int
    device: int
    metrics: dict[str, float]


class ProbeFinished(Exception):
    """No error: training has been probed, and what a stage does after it is left out.

    Attributes:
        measured: JSON values, see `rlhf_exp.stages.training`.
    """

    def __init__(self, measured: dict[str, Any]) -> None:
        super().__init__("probed")
        self.measured = measured


class Recorder:
    """A tracker that keeps what each phase took. Make one where a stage begins.

    Attributes:
        run_id: Of no run.
        libraries: Resident memory where the stage began, bytes.
        phases: Those that are over.
    """

    run_id = ""

    def __init__(self) -> None:
        gc.collect()  # what is left of the stage before
        forget_peaks()
        self.libraries = host_bytes()
        self.phases: list[Phase] = []
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Note that models and data are loaded."""
        self._began = time.perf_counter()

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """End an evaluation or an iteration."""
        name = ITERATION
        if any(key.startswith("eval/") for key in metrics):
            name = EVALUATION if self.phases else START
        self._end(name, metrics)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Nothing: histograms are no part of a measurement."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Nothing: samples are no part of a measurement."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """End the last phase."""
        self._end(END, {})

    def alert(self, title: str, text: str, step: int) -> None:
        """Nothing: what diverges is an error too."""

    def model(self, name: str, made: Path, place: Path, facts: Mapping[str, Any]) -> None:
        """Nothing: none is kept."""

    def mark_preempting(self) -> None:
        """Nothing: there is no run."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing is kept."""

    def to_json(self) -> dict[str, Any]:
        """Return all that was measured in this process."""
        return {
            "libraries": self.libraries,
            "phases": [asdict(phase) for phase in self.phases],
        }

    def _end(self, name: str, metrics: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._began
        found = Phase(name, seconds, host_peak_bytes(), device_peak_bytes(), dict(metrics))
        self.phases.append(found)
        forget_peaks()
        self._began = time.perf_counter()
