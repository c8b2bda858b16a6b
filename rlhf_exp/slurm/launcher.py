"""`hydra/launcher=slurm`: plan, submit what is to be done, wait, and tell how it went."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlhf_exp import experiment
from rlhf_exp.config.check_slurm import shape_of, slurm_problems
from rlhf_exp.config.load import to_dict
from rlhf_exp.config.problems import Problem, refuse
from rlhf_exp.config.root import Config
from rlhf_exp.config.slurm import SlurmConfig
from rlhf_exp.errors import Detached, JobsFailed, UserError
from rlhf_exp.multirun.endings import done_before, note_failure
from rlhf_exp.multirun.points import Point, point_of, shared_work
from rlhf_exp.pipeline.hub import missing, needs
from rlhf_exp.pipeline.plan import records_of
from rlhf_exp.slurm import queue
from rlhf_exp.slurm.snapshot import copy_code, with_own_code
from rlhf_exp.slurm.submission import Job, Submission, latest_jobs, new_submission
from rlhf_exp.slurm.watch import Ending, Failure, wait
from rlhf_exp.slurm.work import Work
from rlhf_exp.store.records import RunRecord
from rlhf_exp.study.job import run_job

Outcome = float | None | Exception


def launch(site: SlurmConfig, jobs: Sequence[tuple[list[str], Config]]) -> list[Outcome]:
    """Run jobs on Slurm and wait for them; jobs that are in the queue already are joined.

    Args:
        site: The site.
        jobs: Command line and config of each.

    Returns:
        The objective of each, or the exception to raise for it.

    Raises:
        UserError: They cannot be submitted.
        Detached: The user pressed Ctrl-C; submitted jobs go on.
    """
    if jobs[0][1].plan:
        return [run_job(config, overrides) for overrides, config in jobs]
    refuse(slurm_problems(site, [config for _, config in jobs]))
    points = [point_of(overrides, config) for overrides, config in jobs]
    if site.offline:
        _refuse_missing(points)
    return _Launch(site, points).run()


class _Launch:
    def __init__(self, site: SlurmConfig, points: list[Point]) -> None:
        self.site, self.points = site, points
        config = points[0].config
        self.name, self.outputs = config.name or experiment.UNNAMED, Path(config.output_dir)
        self.records = records_of(config)
        self.console = Console(stderr=True)
        self.jobs: list[tuple[Submission, Job]] = []

    def run(self) -> list[Outcome]:
        done = self._done()
        self._join()
        there = done.keys() | {job.key for _, job in self.jobs if not job.shared}
        missing = {point.key: point for point in self.points if point.key not in there}
        try:
            if missing:
                with _uninterrupted():
                    self._submit(list(missing.values()))
            self._introduce(len(done))
            endings = wait(self.jobs, self.site.poll_s, self._tell, self._ended)
        except KeyboardInterrupt as error:
            raise Detached(self._detached()) from error
        return self._outcomes(done, endings)

    def _done(self) -> dict[str, RunRecord]:
        """Return the records of points that need no job."""
        return done_before(self.points, self.records, self.name)

    def _join(self) -> None:
        """Find those jobs of earlier submissions that are still in the queue."""
        known = {job.id: (where, job) for where, job in latest_jobs(self.outputs, self.name)}
        try:
            states = queue.states(known)
        except queue.Unreachable as error:
            refuse([Problem("hydra/launcher", "slurm", f"squeue fails: {error}")])
        live = [known[one] for one, state in states.items() if not state.ended]
        wanted = {point.key for point in self.points}
        self.jobs = [found for found in live if found[1].shared or found[1].key in wanted]

    def _submit(self, points: list[Point]) -> None:
        from rlhf_exp.slurm.submit import submit

        shape = shape_of(self.site, points[0].config)
        assert not isinstance(shape, Problem), "checked"
        submission = new_submission(self.outputs, self.name)
        copy_code(submission.code)
        # What an earlier submission makes for all is waited for, not made twice.
        made = {job.key: job.id for _, job in self.jobs if job.shared}
        after: list[str] = []
        for level in [*([] if points[0].config.probe else shared_work(points)), points]:
            shared = level is not points
            new = [point for point in level if not shared or point.key not in made]
            works = [self._work(point, submission, not shared) for point in new]
            ids = submit(self.site, shape, submission, works, self.name, after) if new else []
            for number, point in zip(ids, new, strict=True):
                ranks = shape.nodes * shape.tasks_per_node
                last = point.steps[-1]
                job = Job(number, last.stage, last.key, point.overrides, ranks, shared)
                submission.jobs.append(job)
                self.jobs.append((submission, job))
            submission.write()
            after = [*ids, *(made[point.key] for point in level if shared and point.key in made)]

    def _work(self, point: Point, submission: Submission, recorded: bool) -> Work:
        config = with_own_code(point.config, submission.code)
        if self.site.save_each_iteration:
            # Saves at each boundary, which in PPO is the end of an iteration.
            config = replace(config, ppo=replace(config.ppo, checkpoint_every=1))
        return Work(
            config=to_dict(config),
            overrides=point.overrides,
            key=point.key,
            recorded=recorded,
            grace_s=self.site.grace_s,
            max_restarts=self.site.max_restarts,
        )

    def _introduce(self, done: int) -> None:
        counts = [f"{len(self.points)} points"] + ([f"{done} of them done"] if done else [])
        self._tell(f"{self.name}: {', '.join(counts)}; {len(self.jobs)} jobs in the queue")
        for where in {where.folder: where for where, _ in self.jobs}.values():
            self._tell(f"logs: {where.results}")

    def _detached(self) -> str:
        if not self.jobs:
            return "interrupted: nothing has been submitted"
        return (
            f"interrupted: {len(self.jobs)} jobs stay in Slurm's queue and go on by themselves.\n"
            f"  rlhf-exp status {self.name}    how far they are\n"
            f"  rlhf-exp cancel {self.name}    ends them\n"
            "The same command again waits for them."
        )

    def _ended(self, job: Job, ending: Ending) -> None:
        if not isinstance(ending, Failure):
            self._tell(f"job {job.id} is done: {job.stage} {job.key}")
            return
        self._tell(f"job {job.id} has failed: {job.stage} {job.key}: {ending.reason}")
        self._tell(f"  {ending.log}")
        if not job.shared:
            self._note_failure(job, ending)

    def _note_failure(self, job: Job, failure: Failure) -> None:
        (point,) = {one.key: one for one in self.points if one.key == job.key}.values()
        note_failure(self.records, self.name, point, failure.error)

    def _outcomes(self, done: dict[str, RunRecord], endings: dict[str, Ending]) -> list[Outcome]:
        failures = [one for one in endings.values() if isinstance(one, Failure)]
        lines = [
            f"\n  {one.job.id} {one.job.stage} {one.job.key}: {one.reason}\n    {one.log}"
            for one in failures
        ]
        failed = JobsFailed(f"{len(failures)} of {len(endings)} jobs failed:{''.join(lines)}")
        by_key = {job.key: endings[job.id] for _, job in self.jobs if not job.shared}
        outcomes: list[Outcome] = []
        for point in self.points:
            ending = by_key.get(point.key)
            if isinstance(ending, Failure):
                outcomes.append(failed)
            else:
                outcomes.append(ending.objective if ending else done[point.key].objective)
        return outcomes

    def _tell(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _refuse_missing(points: Sequence[Point]) -> None:
    """Stop where a job would find out on a node that something is not there.

    Raises:
        UserError: Naming it, and the command that fetches it.
    """
    for point in points:
        absent = missing(Path(point.config.output_dir), needs(point.config, point.steps))
        if absent:
            listed = "".join(f"\n  {need}" for need in absent)
            raise UserError(
                "nodes have no network (hydra.launcher.offline=true), and the cache here lacks:"
                f"{listed}\nFetch it on this machine first: rlhf-exp fetch "
                f"{shlex.join(point.overrides)}"
            )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off: a job that is in the queue must also be in the list of jobs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
