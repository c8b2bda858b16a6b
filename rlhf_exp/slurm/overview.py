"""How far the jobs of a name are: what they left, and what Slurm says of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlhf_exp.slurm import queue
from rlhf_exp.slurm.queue import JobState, Unreachable
from rlhf_exp.slurm.submission import Job, Submission, latest_jobs
from rlhf_exp.slurm.watch import Failure, ending_of


class Progress(StrEnum):
    """How far a job is."""

    waiting = "waiting"
    running = "running"
    requeued = "requeued"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    unknown = "unknown"


@dataclass(frozen=True)
class View:
    """A job as a user sees it.

    Attributes:
        job: The job.
        progress: How far it is.
        note: Why it waits or failed, or how often it was started again.
        log: What it printed.
    """

    job: Job
    progress: Progress
    note: str
    log: Path

    @property
    def live(self) -> bool:
        """Whether it is in Slurm's queue."""
        return self.progress in (Progress.waiting, Progress.running, Progress.requeued)


def job_views(output_dir: Path, name: str) -> list[View]:
    """Return the latest job of each point submitted under a name, and of what points share."""
    jobs = list(latest_jobs(output_dir, name))
    try:
        states = queue.states(job.id for _, job in jobs)
    except Unreachable as error:
        return [_unknown(where, job, str(error)) for where, job in jobs]
    return [_view(where, job, states.get(job.id)) for where, job in jobs]


def cancel(output_dir: Path, name: str) -> list[View]:
    """Cancel the jobs of a name that are in the queue; return them.

    Raises:
        UserError: Slurm refuses.
    """
    live = [view for view in job_views(output_dir, name) if view.live]
    if live:
        queue.cancel([view.job.id for view in live])
    ids = {view.job.id for view in live}
    for where in {where.folder: where for where, _ in latest_jobs(output_dir, name)}.values():
        where.cancelled += [job.id for job in where.jobs if job.id in ids]
        where.write()
    return live


def _unknown(where: Submission, job: Job, reason: str) -> View:
    """Return the view of a job without Slurm: only what it left itself."""
    ending = ending_of(where, job, None)
    if isinstance(ending, Failure):
        return View(job, Progress.unknown, reason, where.log(job))
    return View(job, Progress.done, "", where.log(job))


def _view(where: Submission, job: Job, state: JobState | None) -> View:
    if state is not None and not state.ended:
        again = f"start {state.restarts + 1}" if state.restarts else ""
        if state.state == "PENDING":
            progress = Progress.requeued if state.restarts else Progress.waiting
            note = "; ".join(filter(None, (again, state.reason)))
        else:
            progress, note = Progress.running, again
        return View(job, progress, note, where.log(job))
    ending = ending_of(where, job, state)
    if not isinstance(ending, Failure):
        return View(job, Progress.done, "", where.log(job))
    if job.id in where.cancelled or (state is not None and state.state == "CANCELLED"):
        return View(job, Progress.cancelled, "", where.log(job))
    return View(job, Progress.failed, ending.reason, Path(ending.log))
