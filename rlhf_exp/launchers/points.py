"""The points of a multirun: their configs and plans, the stages they share, and their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.config.checks_sweep import describe_points
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.problems import raise_problems
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import JobsFailed, UserError
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.plan import Step, StepState, plan, refuse_changed
from rlhf_exp.pipeline.precision import PrecisionChoice, with_precision
from rlhf_exp.store.run_records import Records, RunRecord, Status


@dataclass(frozen=True)
class SweepPoint:
    """One job of a multirun: an experiment, or a worker of a study.

    Attributes:
        overrides: Its command line.
        config: Its config.
        steps: Its plan; the last step of a worker's plan is the study.
        precision: What `distributed.precision=auto` stands for, if it was that.
    """

    overrides: tuple[str, ...]
    config: Config
    steps: tuple[Step, ...]
    precision: PrecisionChoice | None = None

    @property
    def key(self) -> str:
        """The key of its last step; `worker-N` for a worker."""
        return self.steps[-1].key

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker of a study; then its trials have records, and it has none."""
        return self.config.study.trials is not None

    def record(self, name: str) -> RunRecord:
        """Return the record of a point that has not run yet."""
        return RunRecord(
            name=name,
            stage=self.config.stage.name,
            keys={step.stage: step.key for step in self.steps},
            overrides=self.overrides,
            seed=self.config.seed,
        )

    def up_to(self, stage: str) -> SweepPoint:
        """Return the point that stops after one of its stages."""
        names = [step.stage for step in self.steps]
        steps = self.steps[: names.index(stage) + 1]
        config = replace(self.config, stage=StageName[stage], study=StudyConfig())
        return replace(self, config=config, steps=steps)


def point_of(overrides: Sequence[str], config: Config) -> SweepPoint:
    """Return the point of a job, with its plan.

    Args:
        overrides: Its command line.
        config: Its config.

    Raises:
        UserError: A result that it would reuse was made by other code, or its plan is refused.
    """
    config, choice = with_precision(pinned(config))
    if choice is not None:
        overrides = choice.overrides(overrides)
    if config.study.trials is None:
        steps = plan(config)
    else:
        # The stages before PPO; the values that trials try are not known yet.
        before = replace(config, study=StudyConfig(), stage=StageName.ppo)
        steps = [step for step in plan(before) if step.stage != "ppo"]
        steps.append(Step("study", f"worker-{config.study.worker}", StepState.run))
    refuse_changed(steps)
    return SweepPoint(tuple(overrides), config, tuple(steps), choice)


def points_of(jobs: Sequence[tuple[list[str], Config]]) -> list[SweepPoint]:
    """Return the point of each job; several may have the same key.

    Args:
        jobs: Command line and config of each.

    Raises:
        UserError: All problems of the jobs: a missing file, a result made by other code.
    """
    points: list[SweepPoint] = []
    problems: dict[str, list[int]] = {}
    for index, (overrides, config) in enumerate(jobs):
        try:
            point = point_of(overrides, config)
        except UserError as error:
            problems.setdefault(str(error), []).append(index)
        else:
            points.append(point)
    lines = [overrides for overrides, _ in jobs]
    raise_problems(text + describe_points(lines, set(at)) for text, at in problems.items())
    return points


def precision_choices(points: Sequence[SweepPoint]) -> list[str]:
    """Return in words what `distributed.precision=auto` stands for, each choice once."""
    return list(dict.fromkeys(str(point.precision) for point in points if point.precision))


def distinct(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the first point of each key: points with the same key have the same result."""
    by_key: dict[str, SweepPoint] = {}
    for point in points:
        by_key.setdefault(point.key, point)
    return list(by_key.values())


def shared_work(points: Sequence[SweepPoint]) -> list[list[SweepPoint]]:
    """Return the missing stages that several points need, as points that stop after them.

    A job that needs a stage which another job is running would wait for it with all its GPUs idle.
    So these points run first, one list after the other; those of one list do not need each other.
    """
    needed = Counter(key for point in points for key in _keys_to_run(point))
    # By the stages that a point shares with others, in order: the first such point.
    chains: dict[tuple[tuple[str, str], ...], SweepPoint] = {}
    for point in points:
        shared = tuple(key for key in _keys_to_run(point)[:-1] if needed[key] > 1)
        if shared:
            chains.setdefault(shared, point)
    occurrences = Counter(chain.from_iterable(chains))
    if all(count == 1 for count in occurrences.values()):
        level = [point.up_to(keys[-1][0]) for keys, point in chains.items()]
        return [level] if level else []
    levels: dict[str, dict[str, SweepPoint]] = {}
    for keys, point in chains.items():
        for stage, key in keys:
            levels.setdefault(stage, {}).setdefault(key, point.up_to(stage))
    order = [stage.value for stage in StageName]
    return [list(levels[stage].values()) for stage in sorted(levels, key=order.index)]


def _keys_to_run(point: SweepPoint) -> list[tuple[str, str]]:
    """Return stage and key of each step that would run; of the last one in any case."""
    last = point.steps[-1]
    return [(step.stage, step.key) for step in point.steps if step.needs_work or step is last]


@dataclass(frozen=True)
class JobResult:
    """The result of a point.

    Attributes:
        objective: Its objective, if it has one.
        error: Message or traceback, if it failed.
        seconds: Time it took; `None` if it was done before.
        log: File of its output, if it has one.
        killed: Whether a signal ended its process.
    """

    objective: float | None = None
    error: str | None = None
    seconds: float | None = None
    log: Path | None = None
    killed: bool = False

    @property
    def state(self) -> str:
        """`done`, `cached` or `failed`."""
        if self.error is not None:
            return "failed"
        return "cached" if self.seconds is None else "done"

    @property
    def reason(self) -> str:
        """The error's last line."""
        lines = (self.error or "").strip().splitlines()
        return lines[-1] if lines else ""


def finished_records(
    points: Sequence[SweepPoint], records: Records, name: str
) -> dict[str, RunRecord]:
    """Return the records, by key, of points that need no work."""
    known = {record.key: record for record in records.sweep(name)}
    return {
        point.key: known[point.key]
        for point in points
        if not point.config.probe
        and not any(step.needs_work for step in point.steps)
        and point.key in known
        and known[point.key].status is Status.done
    }


def record_failure(
    records: Records, name: str, point: SweepPoint, error: str, log: Path | None = None
) -> None:
    """Write a point's failure into its record: a killed process could not do so itself."""
    if point.is_worker:
        return
    known = [record for record in records.sweep(name) if record.key == point.key]
    record = known[0] if known else point.record(name)
    if record.status is not Status.failed:
        record = replace(record, status=Status.failed, error=error)
    records.write(replace(record, log=None if log is None else str(log)))


def differing_overrides(points: Sequence[SweepPoint]) -> dict[str, str]:
    """Return the overrides in which each point differs from the others, as text, by key."""
    common = set.intersection(*(set(point.overrides) for point in points))
    return {
        point.key: " ".join(text for text in point.overrides if text not in common)
        for point in points
    }


def print_results(
    points: Sequence[SweepPoint], results: Mapping[str, JobResult], console: Console
) -> None:
    """Print a table of the points' results."""
    table = Table("point", "state", "key", "objective", "time", box=None, pad_edge=False)
    names = differing_overrides(points)
    for key, result in results.items():
        objective = "" if result.objective is None else f"{result.objective:.4g}"
        seconds = "" if result.seconds is None else f"{result.seconds:.0f} s"
        colour = {"failed": "red", "cached": "green"}.get(result.state, "bold")
        row = (names[key], Text(result.state, colour), key, objective, seconds)
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print()
    console.print(table)


def jobs_failed_error(
    points: Sequence[SweepPoint], results: Mapping[str, JobResult]
) -> JobsFailed | None:
    """Return the error that a multirun ends with, if a point has failed."""
    names = differing_overrides(points)
    failed = {key: result for key, result in results.items() if result.error is not None}
    if not failed:
        return None
    lines = []
    for key, result in failed.items():
        where = f"\n    {result.log}" if result.log is not None else ""
        lines.append(f"\n  {names[key] or key}: {result.reason}{where}")
    return JobsFailed(
        f"{len(failed)} of {len(results)} points failed; the same command runs what is "
        f"missing:{''.join(lines)}"
    )
