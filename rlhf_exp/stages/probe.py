"""A probe: a few iterations of a training stage, with the time and peak memory of each phase.

The trainer reports to its tracker at the end of each phase: the evaluation before training, each
iteration, the evaluation after them, and, after the checkpoint and with the module whole again, the
summary. A `Recorder` stands in the tracker's place, so training is measured as it runs, without
knowing.

No stage imports this module: the process that runs a stage puts a `Probe` into its context. A
change here therefore leaves every stored result as it is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.distributed.world import World
from rlhf_exp.stages.context import StageContext
from rlhf_exp.tracking.progress_bar import StageProgress
from rlhf_exp.training.memory import device_peak_bytes, forget_peaks, host_bytes, host_peak_bytes
from rlhf_exp.training.task import Task
from rlhf_exp.training.trainer import TrainingContext, passes, train

ITERATIONS = {"sft": 4, "reward": 4, "dpo": 4, "ppo": 2}
"""Iterations of a stage that are run; of all but PPO, each is an optimizer step."""

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
        metrics: The metrics that the trainer logged.
    """

    name: str
    seconds: float
    host: int
    device: int
    metrics: dict[str, float]


class ProbeFinished(Exception):
    """Ends a stage whose training has been probed; it is no error.

    Attributes:
        measured: JSON values, see `Probe.run`.
    """

    def __init__(self, measured: dict[str, Any]) -> None:
        super().__init__("probed")
        self.measured = measured


class Recorder:
    """A tracker that keeps the time and peak memory of each phase. Make one where a stage begins.

    Attributes:
        run_id: Of no run.
        libraries: Resident memory where the stage began, bytes.
        phases: The phases that are over.
    """

    run_id = ""

    def __init__(self) -> None:
        gc.collect()  # objects of the stage before
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
        """Nothing: a run that diverges raises an error too."""

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """Nothing: none is kept."""

    def mark_preempting(self) -> None:
        """Nothing: there is no run."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing is kept."""

    def to_json(self) -> dict[str, Any]:
        """Return all measurements of this process."""
        return {
            "libraries": self.libraries,
            "phases": [asdict(phase) for phase in self.phases],
        }

    def _end(self, name: str, metrics: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._began
        phase = Phase(name, seconds, host_peak_bytes(), device_peak_bytes(), dict(metrics))
        self.phases.append(phase)
        forget_peaks()
        self._began = time.perf_counter()


class Probe:
    """Measures a training stage in place of training it. Make one where the stage begins.

    Attributes:
        iterations: Iterations that are run.
        recorder: Measures them.

    Args:
        stage: Name of the stage.
    """

    def __init__(self, stage: str) -> None:
        self.iterations = ITERATIONS[stage]
        self.recorder = Recorder()

    def run(
        self,
        section: TrainingConfig,
        steps: int,
        task: Task,
        world: World,
        context: StageContext,
    ) -> NoReturn:
        """Evaluate, train a few iterations, evaluate, write a checkpoint, make the module whole.

        Args:
            section: Config section of the stage.
            steps: Optimizer steps of the whole stage.
            task: The task to measure.
            world: The processes.
            context: Context of the stage.

        Raises:
            ProbeFinished: Always, with `steps` (optimizer steps of the whole stage), `iterations`,
                `evaluations` and `checkpoints` (how many the whole stage has) and `processes` (the
                `Recorder.to_json` of each of them, by rank).
        """
        ends = list(range(task.updates, steps + 1, task.updates))
        last = ends[: self.iterations][-1]
        # The schedule's end comes earlier than in the whole stage; that costs nothing.
        short = replace(section, eval_every=last, checkpoint_every=last, keep_every=None, keep=[])
        with (
            StageProgress(f"{context.stage} (probe)", last, (), shown=world.is_main) as progress,
            context.polite_interrupts() as interrupted,
        ):
            loop = TrainingContext(
                world=world,
                folder=context.folder,
                tracker=lambda resume: self.recorder,
                on_step=progress.update,
                before_write=context.before_write,
                interrupted=interrupted,
            )
            self.recorder.begin()
            train(task, short, last, loop)
        raise ProbeFinished(
            {
                "steps": steps,
                "iterations": len(ends),
                "evaluations": 1 + _due(ends, section.eval_every),
                "checkpoints": _due(ends, section.checkpoint_every),
                "processes": world.all_gather_object(self.recorder.to_json()),
            }
        )


def _due(ends: list[int], every: int) -> int:
    """Return how often something is due that happens every `every` steps and at the end."""
    at_ends = [passes(step, before, every) for before, step in pairwise([0, *ends])]
    return sum(at_ends) + (not at_ends[-1])
