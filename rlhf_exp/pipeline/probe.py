"""A probe: a few iterations of each stage at full size, of which nothing stays but what was seen.

It goes the way of a run: the same crew, the same stages, the same loop. What is written lies in a
folder of its own that is deleted in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from rich.table import Table

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.executor import StageExecutor, StageJob
from rlhf_exp.pipeline.inputs import MODEL
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.plan_table import gib, shape_for, stage_memory

_COLUMNS = 8
"""Of so many processes, the first, each gets a column."""
_TIMES = {
    "time/rollout_s": "sampling",
    "time/score_s": "scoring",
    "time/assess_s": "log-probabilities",
    "time/update_s": "updates",
}


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found of one stage.

    Attributes:
        stage: Its name.
        steps: Optimizer steps of the whole stage.
        iterations: Iterations of the whole stage.
        evaluations: Evaluations of the whole stage.
        checkpoints: Checkpoints of the whole stage.
        processes: Of each process, by rank: `libraries` (bytes of host memory before anything was
            loaded) and `phases` (`rlhf_exp.training.memory.Phase` as JSON values).
    """

    stage: str
    steps: int
    iterations: int
    evaluations: int
    checkpoints: int
    processes: list[dict[str, Any]]

    def phases(self, name: str, rank: int = 0) -> list[dict[str, Any]]:
        """Return the phases of this name of a process."""
        return [one for one in self.processes[rank]["phases"] if one["name"] == name]

    def seconds(self, name: str) -> float:
        """Return the mean time of a phase; of iterations but the first, which warms up."""
        found = [one["seconds"] for one in self.phases(name)]
        return fmean(found[1:] or found)

    def peak(self, where: str, rank: int, *names: str) -> int:
        """Return the most memory (`host` or `device`) of a process in the phases named."""
        return max(one[where] for name in names for one in self.phases(name, rank))

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
    config: Config, steps: list[Step], crew: StageExecutor, tell: Callable[[str], None]
) -> Iterator[ProbeResult]:
    """Train a few iterations of each training stage asked for; yield what was measured.

    Args:
        config: The experiment.
        steps: Its plan.
        crew: Does the work of a stage.
        tell: Says something to the user.

    Raises:
        UserError: All these stages are given (`STAGE.use`), so none would train.
    """
    asked = [step for step in steps if config.stage.name in (step.stage, "pipeline", "eval")]
    chosen = [step for step in asked if step.stage != "eval" and step.state != StepState.given]
    if not chosen:
        raise UserError(
            f"probe=true stage={config.stage.name}: nothing would train, for the models are given; "
            "leave out STAGE.use of the stage to probe"
        )
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".probe-", dir=output) as name:
        folder = Path(name).resolve()
        models = _models(config, steps, folder, crew, tell)
        for step in chosen:
            tell(f"{step.stage}: probing")
            order = _order(step.stage, folder, models, step)
            result = crew.run(order, lambda: None)
            yield ProbeResult(step.stage, **result.measured)


def _models(
    config: Config,
    steps: list[Step],
    folder: Path,
    crew: StageExecutor,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Return the model of each role: trained or given where there is one, else a stand-in."""
    models = {step.stage: step.model for step in steps if step.model is not None}
    for step in steps:
        if step.artifact is not None and step.stage not in models:
            models[step.stage] = str(step.artifact.path / MODEL)
    if config.model.path is not None:
        models["base"] = config.model.path
    if config.stage.name == "sft" or models.keys() >= {"sft", "reward"}:
        return models
    made = crew.run(_order("placeholders", folder, models), lambda: None).facts
    for role in made:
        tell(f"no {role} model in the store: probing with the base model's weights in its place")
    return models | {role: str(place) for role, place in made.items()}


def _order(stage: str, folder: Path, models: dict[str, str], step: Step | None = None) -> StageJob:
    place = mkdtemp(prefix=f"{stage}-", dir=folder)
    return StageJob(
        stage=stage,
        key="probe",
        folder=place,
        models=models,
        parents={} if step is None else step.parents,
        inputs={} if step is None else step.inputs,
        claim=None,
        cache=str(folder / "cache"),
        probe=step is not None,
    )


def probe_table(config: Config, found: ProbeResult) -> Table:
    """Return memory and speed of a stage, beside the plan's estimate."""
    ranks = range(min(len(found.processes), _COLUMNS))
    estimate = stage_memory(config, found.stage, shape_for(config.model))
    table = Table(
        title=f"{found.stage}, probed",
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
    gpu = any(found.peak("device", rank, "start", *names) for rank in ranks)
    rows = [("GPU memory", "device")] if gpu else []
    for label, where in [*rows, ("host memory", "host")]:
        planned = estimate.peak + estimate.host if where == "host" and not gpu else estimate.peak
        if where == "host" and gpu:
            planned = estimate.host
        for text, phases in (
            (f"{label} in training, GiB", names),
            ("  while loading", ("start",)),
            ("  for checkpoints and at the end", ("end",)),
        ):
            peaks = [gib(found.peak(where, rank, *phases)) for rank in ranks]
            table.add_row(text, gib(planned) if phases == names else "", *peaks)
    libraries = [gib(found.processes[rank]["libraries"]) for rank in ranks]
    table.add_row("  of host memory, libraries", "not in it", *libraries)
    table.add_section()
    for text, value in _speed(found):
        table.add_row(text, "", value)
    return table


def _speed(found: ProbeResult) -> Iterator[tuple[str, str]]:
    metrics = found.phases("iteration")[-1]["metrics"]
    updates = found.steps // found.iterations
    yield f"an iteration ({updates} optimizer steps)", _time(found.seconds("iteration"))
    for name, label in _TIMES.items():
        if name in metrics:
            yield f"  {label}", _time(metrics[name])
    for name, value in metrics.items():
        if name.startswith("throughput/"):
            yield (
                f"  {name.removeprefix('throughput/').replace('_per_s', ' a second')}",
                f"{value:.4g}",
            )
    yield "an evaluation", _time(found.seconds("evaluation"))
    yield "a checkpoint, and the end", _time(found.seconds("end"))
    yield (
        f"to the end ({found.iterations} iterations, {found.evaluations} evaluations, "
        f"{found.checkpoints} checkpoints)",
        _time(found.remaining),
    )


def _time(seconds: float) -> str:
    """Return a duration in words that fit its size."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
