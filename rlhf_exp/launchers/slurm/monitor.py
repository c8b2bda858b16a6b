"""Waits for submitted jobs: results from files, states from the queue.

Slurm's queue: what state jobs are in, and how to cancel them.

Only `squeue`, `scancel` and, where it works, `sacct` are asked: a site without accounting has no
`sacct`, and `squeue` forgets a finished job after some minutes.

How far the jobs of a name are: what they left, and what Slurm says of them.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.launchers.slurm.submissions import (
    Submission,
    SubmittedJob,
    TaskResult,
    first_error,
    latest_jobs,
    read_result,
    tail,
)

# A job may be between two states for a moment, and a file system slower than Slurm.
LOOKS = 3


@dataclass(frozen=True)
class JobFailure:
    """A job that has failed.

    Attributes:
        job: The job.
        error: Its traceback, or how Slurm ended it and what it printed last.
        log: File with all that it printed.
    """

    job: SubmittedJob
    error: str
    log: str

    @property
    def reason(self) -> str:
        """The error's last line."""
        return self.error.strip().splitlines()[-1] if self.error.strip() else "unknown"


Ending = TaskResult | JobFailure


def wait(
    jobs: Sequence[tuple[Submission, SubmittedJob]],
    poll_s: float,
    tell: Callable[[str], None],
    on_end: Callable[[SubmittedJob, Ending], None],
) -> dict[str, Ending]:
    """Wait until all jobs have ended.

    Args:
        jobs: The jobs, each with its submission.
        poll_s: Seconds between two looks.
        tell: Says something to the user.
        on_end: Told each job as it ends.

    Returns:
        How each has ended, by Slurm's number.
    """
    endings: dict[str, Ending] = {}
    said: dict[str, tuple[str, int]] = {}
    gone = {job.id: 0 for _, job in jobs}
    silent = False
    while len(endings) < len(jobs):
        left = [(where, job) for where, job in jobs if job.id not in endings]
        try:
            states = job_states(job.id for _, job in left)
            silent = False
        except Unreachable as error:
            if not silent:
                tell(f"Slurm does not answer ({error}); trying on")
            silent, states = True, {}
        for where, job in [] if silent else left:
            state = states.get(job.id)
            _say(job, state, said, tell)
            gone[job.id] = gone[job.id] + 1 if state is None or state.ended else 0
            ending = _ending(where, job, state, given_up=gone[job.id] >= LOOKS)
            if ending is not None and gone[job.id]:
                endings[job.id] = ending
                on_end(job, ending)
        if len(endings) < len(jobs):
            time.sleep(poll_s)
    return endings


def ending_of(where: Submission, job: SubmittedJob, state: JobState | None) -> Ending:
    """Return how a job that is no longer in the queue, or in a last state, has ended."""
    ending = _ending(where, job, state, given_up=True)
    assert ending is not None
    return ending


def _ending(
    where: Submission, job: SubmittedJob, state: JobState | None, given_up: bool
) -> Ending | None:
    found = first_error(where.results, job.id, job.ranks)
    if found is not None:
        rank, error = found
        return JobFailure(job, error, str(where.log(job, rank)))
    result = read_result(where.results, job.id)
    if result is not None or not given_up:
        return result
    log = where.log(job)
    how = (state.state if state is not None else last_state(job.id)) or "unknown to Slurm"
    printed = tail(log)
    text = f"{printed}\njob {job.id} has ended without a result (state: {how})".strip()
    return JobFailure(job, text, str(log))


def _say(
    job: SubmittedJob,
    state: JobState | None,
    said: dict[str, tuple[str, int]],
    tell: Callable[[str], None],
) -> None:
    """Tell the user of a start and of a restart, once."""
    if state is None or state.state not in ("RUNNING", "PENDING"):
        return
    now, before = (state.state, state.restarts), said.get(job.id)
    said[job.id] = now
    if now == before or (before is None and state.state == "PENDING"):
        return
    word = "runs" if state.state == "RUNNING" else f"waits ({state.reason})"
    again = f", start {state.restarts + 1}" if state.restarts else ""
    tell(f"job {job.id} {word}{again}: {job.stage} {job.key} {' '.join(job.overrides)}".rstrip())


TIMEOUT_S = 60
# Of the states that squeue shows, those that a job does not leave again.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)


class Unreachable(Exception):
    """Slurm does not answer; it may later."""


@dataclass(frozen=True)
class JobState:
    """A job in the queue.

    Attributes:
        state: Slurm's word for it, such as `PENDING` or `RUNNING`.
        restarts: How often it has been started again.
        reason: Why it waits, in Slurm's words.
    """

    state: str
    restarts: int
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in ENDED


def job_states(ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of each job that Slurm still knows.

    Args:
        ids: Numbers such as `12`, or `12_3` for the third job of an array.

    Raises:
        Unreachable: Slurm does not answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    masters = sorted({one.partition("_")[0] for one in wanted})
    columns = "JobArrayID:60,State:30,RestartCnt:12,Reason:200"
    ended = _run("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(masters)}",
                 f"--Format={columns}")  # fmt: skip
    if ended.returncode:
        if "Invalid job id" in ended.stderr:
            return {}
        raise Unreachable(ended.stderr.strip())
    found = {}
    for line in ended.stdout.splitlines():
        job, state, restarts, *reason = line.split()
        if job in wanted:
            found[job] = JobState(state, int(restarts), " ".join(reason))
    return found


def last_state(job: str) -> str | None:
    """Return how a job that left the queue has ended, if there is accounting."""
    try:
        ended = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State",
                     f"--jobs={job}")  # fmt: skip
    except Unreachable:
        return None
    return ended.stdout.split()[0] if ended.returncode == 0 and ended.stdout.split() else None


def cancel_jobs(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are left alone.

    Raises:
        UserError: Slurm refuses.
    """
    try:
        ended = _run("scancel", *ids)
    except Unreachable as error:
        raise UserError(f"scancel: {error}") from error
    if ended.returncode and "Invalid job id" not in ended.stderr:
        raise UserError(f"scancel: {ended.stderr.strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise Unreachable(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{command[0]} has not answered for {TIMEOUT_S} s") from error


class JobProgress(StrEnum):
    """How far a job is."""

    waiting = "waiting"
    running = "running"
    requeued = "requeued"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    unknown = "unknown"


@dataclass(frozen=True)
class JobView:
    """A job as a user sees it.

    Attributes:
        job: The job.
        progress: How far it is.
        note: Why it waits or failed, or how often it was started again.
        log: What it printed.
    """

    job: SubmittedJob
    progress: JobProgress
    note: str
    log: Path

    @property
    def live(self) -> bool:
        """Whether it is in Slurm's queue."""
        return self.progress in (JobProgress.waiting, JobProgress.running, JobProgress.requeued)


def job_views(output_dir: Path, name: str) -> list[JobView]:
    """Return the latest job of each point submitted under a name, and of what points share."""
    jobs = list(latest_jobs(output_dir, name))
    try:
        states = job_states(job.id for _, job in jobs)
    except Unreachable as error:
        return [_unknown(where, job, str(error)) for where, job in jobs]
    return [_view(where, job, states.get(job.id)) for where, job in jobs]


def cancel_by_name(output_dir: Path, name: str) -> list[JobView]:
    """Cancel the jobs of a name that are in the queue; return them.

    Raises:
        UserError: Slurm refuses.
    """
    live = [view for view in job_views(output_dir, name) if view.live]
    if live:
        cancel_jobs([view.job.id for view in live])
    ids = {view.job.id for view in live}
    for where in {where.folder: where for where, _ in latest_jobs(output_dir, name)}.values():
        where.cancelled += [job.id for job in where.jobs if job.id in ids]
        where.write()
    return live


def _unknown(where: Submission, job: SubmittedJob, reason: str) -> JobView:
    """Return the view of a job without Slurm: only what it left itself."""
    ending = ending_of(where, job, None)
    if isinstance(ending, JobFailure):
        return JobView(job, JobProgress.unknown, reason, where.log(job))
    return JobView(job, JobProgress.done, "", where.log(job))


def _view(where: Submission, job: SubmittedJob, state: JobState | None) -> JobView:
    if state is not None and not state.ended:
        again = f"start {state.restarts + 1}" if state.restarts else ""
        if state.state == "PENDING":
            progress = JobProgress.requeued if state.restarts else JobProgress.waiting
            note = "; ".join(filter(None, (again, state.reason)))
        else:
            progress, note = JobProgress.running, again
        return JobView(job, progress, note, where.log(job))
    ending = ending_of(where, job, state)
    if not isinstance(ending, JobFailure):
        return JobView(job, JobProgress.done, "", where.log(job))
    if job.id in where.cancelled or (state is not None and state.state == "CANCELLED"):
        return JobView(job, JobProgress.cancelled, "", where.log(job))
    return JobView(job, JobProgress.failed, ending.reason, Path(ending.log))
