"""The points of a multirun: each one's config and plan, and what they share.

How the points of a multirun have ended: records, the table at the end, the exit code.
"""

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
from rlhf_exp.store.run_records import Records, RunRecord, Status


@dataclass(frozen=True)
class SweepPoint:
    """One job of a multirun: an experiment, or a worker of a study.

    Attributes:
        overrides: Its command line.
        config: Its config.
        steps: Its plan; a worker's ends with the study as its last step.
    """

    overrides: tuple[str, ...]
    config: Config
    steps: tuple[Step, ...]

    @property
    def key(self) -> str:
        """The final key; `worker-N` of a worker."""
        return self.steps[-1].key

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker of a study, whose trials have records of their own."""
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

    def brought_to(self, stage: str) -> SweepPoint:
        """Return the point that stops after one of its stages."""
        names = [step.stage for step in self.steps]
        steps = self.steps[: names.index(stage) + 1]
        config = replace(self.config, stage=StageName[stage], study=StudyConfig())
        return replace(self, config=config, steps=steps)


def point_of(overrides: Sequence[str], config: Config) -> SweepPoint:
    """Return the point of a job.

    Args:
        overrides: Its command line.
        config: Its config.

    Raises:
        UserError: What it would reuse was made by other code.
    """
    settled = pinned(config)
    if settled.study.trials is None:
        steps = plan(settled)
    else:
        # What trials start from; the values that they try are not known yet.
        begin = replace(settled, study=StudyConfig(), stage=StageName.ppo)
        steps = [step for step in plan(begin) if step.stage != "ppo"]
        steps.append(Step("study", f"worker-{settled.study.worker}", StepState.run))
    refuse_changed(steps)
    return SweepPoint(tuple(overrides), settled, tuple(steps))


def points_of(jobs: Sequence[tuple[list[str], Config]]) -> list[SweepPoint]:
    """Return the point of each job with its plan; several may have one key.

    Args:
        jobs: Command line and config of each.

    Raises:
        UserError: What is wrong with any of them: a file that is missing, a result that other code
            has made.
    """
    found: list[SweepPoint] = []
    wrong: dict[str, list[int]] = {}
    for index, (overrides, config) in enumerate(jobs):
        try:
            point = point_of(overrides, config)
        except UserError as error:
            wrong.setdefault(str(error), []).append(index)
        else:
            found.append(point)
    lines = [overrides for overrides, _ in jobs]
    raise_problems(text + describe_points(lines, set(at)) for text, at in wrong.items())
    return found


def distinct(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points without those whose key an earlier one has: they have one result."""
    found: dict[str, SweepPoint] = {}
    for point in points:
        found.setdefault(point.key, point)
    return list(found.values())


def shared_work(points: Sequence[SweepPoint]) -> list[list[SweepPoint]]:
    """Return what several points need and nobody has made, as points that stop there.

    A job that found another one at work would wait for it with all its GPUs idle. So these come
    first, one list after the other; those of one list do not need each other.
    """
    needed = Counter(key for point in points for key in _work(point))
    # The stages of a point that others need too, in order.
    chains: dict[tuple[tuple[str, str], ...], SweepPoint] = {}
    for point in points:
        shared = tuple(key for key in _work(point)[:-1] if needed[key] > 1)
        if shared:
            chains.setdefault(shared, point)
    met = Counter(chain.from_iterable(chains))
    if all(count == 1 for count in met.values()):
        alone = [point.brought_to(keys[-1][0]) for keys, point in chains.items()]
        return [alone] if alone else []
    levels: dict[str, dict[str, SweepPoint]] = {}
    for keys, point in chains.items():
        for stage, key in keys:
            levels.setdefault(stage, {}).setdefault(key, point.brought_to(stage))
    order = [stage.value for stage in StageName]
    return [list(levels[stage].values()) for stage in sorted(levels, key=order.index)]


def _work(point: SweepPoint) -> list[tuple[str, str]]:
    """Return stage and key of each step that would run; of the last one in any case."""
    last = point.steps[-1]
    return [(step.stage, step.key) for step in point.steps if step.needs_work or step is last]


@dataclass(frozen=True)
class JobResult:
    """How a point has ended.

    Attributes:
        objective: What it achieved, if it has an objective.
        error: Message or traceback, for a point that failed.
        seconds: Time it took; `None` for one that was done before.
        log: File with what it printed, if it has one.
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


def done_before(points: Sequence[SweepPoint], records: Records, name: str) -> dict[str, RunRecord]:
    """Return the records, by final key, of points with nothing left to do."""
    found = {record.key: record for record in records.sweep(name)}
    return {
        point.key: found[point.key]
        for point in points
        if not point.config.probe
        and not any(step.needs_work for step in point.steps)
        and point.key in found
        and found[point.key].status is Status.done
    }


def note_failure(
    records: Records, name: str, point: SweepPoint, error: str, log: Path | None = None
) -> None:
    """Let a point's record say that it failed: one that was killed could not do so itself."""
    if point.is_worker:
        return
    found = [one for one in records.sweep(name) if one.key == point.key]
    record = found[0] if found else point.record(name)
    if record.status is not Status.failed:
        record = replace(record, status=Status.failed, error=error)
    records.write(replace(record, log=None if log is None else str(log)))


def varied(points: Sequence[SweepPoint]) -> dict[str, str]:
    """Return the overrides in which each point differs from the others, by final key."""
    common = set.intersection(*(set(point.overrides) for point in points))
    return {
        point.key: " ".join(text for text in point.overrides if text not in common)
        for point in points
    }


def show(points: Sequence[SweepPoint], endings: Mapping[str, JobResult], console: Console) -> None:
    """Print how each point has ended."""
    table = Table("point", "state", "key", "objective", "time", box=None, pad_edge=False)
    names = varied(points)
    for key, ending in endings.items():
        objective = "" if ending.objective is None else f"{ending.objective:.4g}"
        seconds = "" if ending.seconds is None else f"{ending.seconds:.0f} s"
        colour = {"failed": "red", "cached": "green"}.get(ending.state, "bold")
        row = (names[key], Text(ending.state, colour), key, objective, seconds)
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print()
    console.print(table)


def failure_of(points: Sequence[SweepPoint], endings: Mapping[str, JobResult]) -> JobsFailed | None:
    """Return the error that a multirun ends with, if a point has failed."""
    names = varied(points)
    failed = {key: ending for key, ending in endings.items() if ending.error is not None}
    if not failed:
        return None
    lines = []
    for key, ending in failed.items():
        where = f"\n    {ending.log}" if ending.log is not None else ""
        lines.append(f"\n  {names[key] or key}: {ending.reason}{where}")
    return JobsFailed(
        f"{len(failed)} of {len(endings)} points failed; the same command runs what is "
        f"missing:{''.join(lines)}"
    )
