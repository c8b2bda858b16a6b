"""A probe runs a few iterations of each stage at full size, to measure memory and speed.

It uses the executor, stages and training loop of a run. Its files lie in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from rich.table import Table

from rlhf_exp.config.experiment import UNTRAINED, Config
from rlhf_exp.errors import UserError
from rlhf_exp.models.memory_estimate import MemoryEstimate
from rlhf_exp.pipeline.executor import StageExecutor
from rlhf_exp.pipeline.inputs import MODEL
from rlhf_exp.pipeline.local_models import local_models
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.plan_table import gib, shape_for, stage_memory
from rlhf_exp.stages.context import StageJob

_KEY = "probe"
_COLUMNS = 8
"""Number of processes, the first ones, that have a column in the table."""
_TIMES = {
    "time/rollout_s": "sampling",
    "time/score_s": "scoring",
    "time/assess_s": "log-probabilities",
    "time/update_s": "updates",
}


@dataclass(frozen=True)
class ProbeResult:
    """The measurements of one stage.

    Attributes:
        stage: Name of the stage.
        steps: Optimizer steps of the whole stage.
        iterations: Iterations of the whole stage.
        evaluations: Evaluations of the whole stage.
        checkpoints: Checkpoints of the whole stage.
        processes: For each rank, `libraries` (bytes of host memory before the models were loaded)
            and `phases` (`rlhf_exp.stages.probe.Phase` as JSON values).
    """

    stage: str
    steps: int
    iterations: int
    evaluations: int
    checkpoints: int
    processes: list[dict[str, Any]]

    def phases(self, name: str, rank: int = 0) -> list[dict[str, Any]]:
        """Return a process's phases of one name."""
        return [phase for phase in self.processes[rank]["phases"] if phase["name"] == name]

    def seconds(self, name: str) -> float:
        """Return the mean time of a phase, without the first of several, which warms up."""
        times = [phase["seconds"] for phase in self.phases(name)]
        return fmean(times[1:] or times)

    def peak(self, where: str, rank: int, *names: str) -> int:
        """Return the peak memory (`host` or `device`) of a process in the named phases."""
        return max(phase[where] for name in names for phase in self.phases(name, rank))

    @property
    def remaining(self) -> float:
        """Seconds that the whole stage would take."""
        return (
            self.seconds("start")
            + self.iterations * self.seconds("iteration")
            + (self.evaluations - 1) * self.seconds("evaluation")
            + self.checkpoints * self.seconds("end")
        )


def probe(
    config: Config, steps: list[Step], executor: StageExecutor, tell: Callable[[str], None]
) -> Iterator[ProbeResult]:
    """Train a few iterations of each training stage of the config; yield the measurements.

    Args:
        config: The experiment.
        steps: Its plan.
        executor: Runs the stages.
        tell: Prints a line for the user.

    Raises:
        UserError: All these stages are given (`STAGE.use`), so none would train.
    """
    wanted = [step for step in steps if config.stage.name in (step.stage, "pipeline", "eval")]
    chosen = [
        step for step in wanted if step.stage not in UNTRAINED and step.state != StepState.given
    ]
    if not chosen:
        raise UserError(
            f"probe=true stage={config.stage.name}: nothing would train, for the models are given; "
            "leave out STAGE.use of the stage to probe"
        )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".probe-", dir=output) as name:
        folder = Path(name).resolve()
        models = _models(config, steps, folder, executor, tell)
        for step in chosen:
            tell(f"{step.stage}: probing")
            job = step.job(_stage_folder(folder, step.stage), folder / "cache", models, probe=True)
            # The key of a result must not name what is thrown away.
            result = executor.run(replace(job, key=_KEY), lambda: None)
            yield ProbeResult(step.stage, **result.measured)


def _models(
    config: Config,
    steps: list[Step],
    folder: Path,
    executor: StageExecutor,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Return the model of each role: a trained or given one, else a placeholder."""
    steps, base = local_models(config, steps)
    models = {step.stage: step.model for step in steps if step.model is not None}
    for step in steps:
        if step.artifact is not None and step.stage not in models:
            models[step.stage] = str(step.artifact.path / MODEL)
    if base is not None:
        models["base"] = base
    if config.stage.name == "sft" or models.keys() >= {"sft", "reward"}:
        return models
    stage = "placeholders"
    job = StageJob(stage, _KEY, _stage_folder(folder, stage), str(folder / "cache"), models)
    placeholders = executor.run(job, lambda: None).facts
    for role in placeholders:
        tell(f"no {role} model in the store: probing with the base model's weights in its place")
    return models | {role: str(path) for role, path in placeholders.items()}


def _stage_folder(folder: Path, stage: str) -> str:
    return mkdtemp(prefix=f"{stage}-", dir=folder)


def probe_table(config: Config, result: ProbeResult) -> Table:
    """Return a table of a stage's memory and speed, beside the plan's estimate."""
    ranks = range(min(len(result.processes), _COLUMNS))
    shape = shape_for(config.model)
    estimate = None if shape is None else stage_memory(config, result.stage, shape)
    table = Table(
        title=f"{result.stage}, probed",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        min_width=60,
    )
    table.add_column("")
    table.add_column("planned", justify="right")
    for rank in ranks:
        table.add_column(f"process {rank}", justify="right")
    names = ("iteration", "evaluation")
    gpu = any(result.peak("device", rank, "start", *names) for rank in ranks)
    rows = [("GPU memory", "device")] if gpu else []
    for label, where in [*rows, ("host memory", "host")]:
        planned = "" if estimate is None else gib(_planned(estimate, where, gpu))
        for text, phases in (
            (f"{label} in training, GiB", names),
            ("  while loading", ("start",)),
            ("  for checkpoints and at the end", ("end",)),
        ):
            peaks = [gib(result.peak(where, rank, *phases)) for rank in ranks]
            table.add_row(text, planned if phases == names else "", *peaks)
    libraries = [gib(result.processes[rank]["libraries"]) for rank in ranks]
    table.add_row("  of host memory, libraries", "not in it", *libraries)
    table.add_section()
    for text, value in _speed(result):
        table.add_row(text, "", value)
    return table


def _planned(estimate: MemoryEstimate, where: str, gpu: bool) -> int:
    """Return the estimated peak, bytes, on the `device` or the `host` (all of it without a GPU)."""
    if where == "device":
        return estimate.peak
    return estimate.host if gpu else estimate.peak + estimate.host


def _speed(result: ProbeResult) -> Iterator[tuple[str, str]]:
    metrics = result.phases("iteration")[-1]["metrics"]
    updates = result.steps // result.iterations
    yield f"an iteration ({updates} optimizer steps)", _time(result.seconds("iteration"))
    for name, label in _TIMES.items():
        if name in metrics:
            yield f"  {label}", _time(metrics[name])
    for name, value in metrics.items():
        if name.startswith("throughput/"):
            yield (
                f"  {name.removeprefix('throughput/').replace('_per_s', ' a second')}",
                f"{value:.4g}",
            )
    yield "an evaluation", _time(result.seconds("evaluation"))
    yield "a checkpoint, and the end", _time(result.seconds("end"))
    yield (
        f"to the end ({result.iterations} iterations, {result.evaluations} evaluations, "
        f"{result.checkpoints} checkpoints)",
        _time(result.remaining),
    )


def _time(seconds: float) -> str:
    """Return a duration in words that fit its size."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
