"""What a few iterations cost: time and peak memory of each phase, as a tracker sees them.

The loop reports to its tracker at the end of each phase: the evaluation before training, each
iteration, the evaluation after them, and, after the checkpoint and with the module whole again, the
summary. So it is measured as it runs, without knowing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.engines.native.memory import (
    device_peak_bytes,
    forget_peaks,
    host_bytes,
    host_peak_bytes,
)

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


class Probed(Exception):
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
