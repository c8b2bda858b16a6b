"""Watches submitted jobs: results from files, states from Slurm's queue, cancelling.

Only `squeue`, `scancel` and, if it works, `sacct` are used: a site without accounting has no
`sacct`, and `squeue` forgets a finished job after some minutes.
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
    log_tail,
    read_result,
)

POLLS_BEFORE_LOST = 3
"""Polls without a job or its result before it counts as failed: a job may be between two states for
a moment, and a file system slower than Slurm."""

TIMEOUT_S = 60
# The states of `squeue` that are final.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)


@dataclass(frozen=True)
class JobFailure:
    """A job that has failed.

    Attributes:
        job: The job.
        error: Its traceback, or the last lines of its log and the state in which Slurm ended it.
        log: File of its output.
    """

    job: SubmittedJob
    error: str
    log: str

    @property
    def reason(self) -> str:
        """The error's last line."""
        return self.error.strip().splitlines()[-1] if self.error.strip() else "unknown"


JobOutcome = TaskResult | JobFailure


def wait(
    jobs: Sequence[tuple[Submission, SubmittedJob]],
    poll_s: float,
    announce: Callable[[str], None],
    on_end: Callable[[SubmittedJob, JobOutcome], None],
) -> dict[str, JobOutcome]:
    """Wait until all jobs have ended.

    Args:
        jobs: The jobs, each with its submission.
        poll_s: Seconds between two polls.
        announce: Prints a line for the user.
        on_end: Called for each job as it ends.

    Returns:
        The outcome of each, by Slurm's number.
    """
    outcomes: dict[str, JobOutcome] = {}
    announced: dict[str, tuple[str, int]] = {}
    polls_gone = {job.id: 0 for _, job in jobs}
    unreachable = False
    while len(outcomes) < len(jobs):
        left = [(submission, job) for submission, job in jobs if job.id not in outcomes]
        try:
            states = job_states(job.id for _, job in left)
            unreachable = False
        except Unreachable as error:
            if not unreachable:
                announce(f"Slurm does not answer ({error}); trying on")
            unreachable, states = True, {}
        for submission, job in [] if unreachable else left:
            state = states.get(job.id)
            _announce_state(job, state, announced, announce)
            ended = state is None or state.ended
            polls_gone[job.id] = polls_gone[job.id] + 1 if ended else 0
            outcome = _outcome(
                submission, job, state, given_up=polls_gone[job.id] >= POLLS_BEFORE_LOST
            )
            if outcome is not None and polls_gone[job.id]:
                outcomes[job.id] = outcome
                on_end(job, outcome)
        if len(outcomes) < len(jobs):
            time.sleep(poll_s)
    return outcomes


def outcome_of(submission: Submission, job: SubmittedJob, state: JobState | None) -> JobOutcome:
    """Return the outcome of a job that has left the queue, or is in a final state."""
    outcome = _outcome(submission, job, state, given_up=True)
    assert outcome is not None
    return outcome


def _outcome(
    submission: Submission, job: SubmittedJob, state: JobState | None, given_up: bool
) -> JobOutcome | None:
    failure = first_error(submission.results, job.id, job.ranks)
    if failure is not None:
        rank, error = failure
        return JobFailure(job, error, str(submission.log(job, rank)))
    result = read_result(submission.results, job.id)
    if result is not None or not given_up:
        return result
    log = submission.log(job)
    final_state = (state.state if state is not None else last_state(job.id)) or "unknown to Slurm"
    printed = log_tail(log)
    text = f"{printed}\njob {job.id} has ended without a result (state: {final_state})".strip()
    return JobFailure(job, text, str(log))


def _announce_state(
    job: SubmittedJob,
    state: JobState | None,
    announced: dict[str, tuple[str, int]],
    announce: Callable[[str], None],
) -> None:
    """Announce a start, a restart or a wait once."""
    if state is None or state.state not in ("RUNNING", "PENDING"):
        return
    now, before = (state.state, state.restarts), announced.get(job.id)
    announced[job.id] = now
    if now == before or (before is None and state.state == "PENDING"):
        return
    verb = "runs" if state.state == "RUNNING" else f"waits ({state.reason})"
    again = f", start {state.restarts + 1}" if state.restarts else ""
    announce(
        f"job {job.id} {verb}{again}: {job.stage} {job.key} {' '.join(job.overrides)}".rstrip()
    )


class JobProgress(StrEnum):
    """The progress of a job."""

    waiting = "waiting"
    running = "running"
    requeued = "requeued"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    unknown = "unknown"


@dataclass(frozen=True)
class JobView:
    """A job's progress, for display.

    Attributes:
        job: The job.
        progress: Its progress.
        note: Why it waits or failed, or its number of starts.
        log: File of its output.
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
    """Return the latest job of each point, and of each shared stage, submitted under a name."""
    jobs = list(latest_jobs(output_dir, name))
    try:
        states = job_states(job.id for _, job in jobs)
    except Unreachable as error:
        return [_unknown(submission, job, str(error)) for submission, job in jobs]
    return [_view(submission, job, states.get(job.id)) for submission, job in jobs]


def cancel_by_name(output_dir: Path, name: str) -> list[JobView]:
    """Cancel the jobs of a name that are in the queue; return them.

    Raises:
        UserError: Slurm refuses.
    """
    live = [view for view in job_views(output_dir, name) if view.live]
    if live:
        cancel_jobs([view.job.id for view in live])
    ids = {view.job.id for view in live}
    for submission in {
        submission.folder: submission for submission, _ in latest_jobs(output_dir, name)
    }.values():
        submission.cancelled += [job.id for job in submission.jobs if job.id in ids]
        submission.write()
    return live


def _unknown(submission: Submission, job: SubmittedJob, reason: str) -> JobView:
    """Return the view of a job from its own files, when Slurm does not answer."""
    outcome = outcome_of(submission, job, None)
    if isinstance(outcome, JobFailure):
        return JobView(job, JobProgress.unknown, reason, submission.log(job))
    return JobView(job, JobProgress.done, "", submission.log(job))


def _view(submission: Submission, job: SubmittedJob, state: JobState | None) -> JobView:
    if state is not None and not state.ended:
        again = f"start {state.restarts + 1}" if state.restarts else ""
        if state.state == "PENDING":
            progress = JobProgress.requeued if state.restarts else JobProgress.waiting
            note = "; ".join(filter(None, (again, state.reason)))
        else:
            progress, note = JobProgress.running, again
        return JobView(job, progress, note, submission.log(job))
    outcome = outcome_of(submission, job, state)
    if not isinstance(outcome, JobFailure):
        return JobView(job, JobProgress.done, "", submission.log(job))
    if job.id in submission.cancelled or (state is not None and state.state == "CANCELLED"):
        return JobView(job, JobProgress.cancelled, "", submission.log(job))
    return JobView(job, JobProgress.failed, outcome.reason, Path(outcome.log))


class Unreachable(Exception):
    """Slurm does not answer, perhaps for a moment."""


@dataclass(frozen=True)
class JobState:
    """A job in the queue.

    Attributes:
        state: Slurm's name of its state, such as `PENDING` or `RUNNING`.
        restarts: Number of starts after the first.
        reason: Slurm's reason why it waits.
    """

    state: str
    restarts: int
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in ENDED


def job_states(ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of each job that `squeue` shows; it forgets a job minutes after its end.

    Args:
        ids: Numbers such as `12`, or `12_3` for the third job of an array.

    Raises:
        Unreachable: Slurm does not answer.
    """
    requested = set(ids)
    if not requested:
        return {}
    arrays = sorted({job.partition("_")[0] for job in requested})
    columns = "JobArrayID:60,State:30,RestartCnt:12,Reason:200"
    squeue = _run("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}",
                 f"--Format={columns}")  # fmt: skip
    if squeue.returncode:
        if "Invalid job id" in squeue.stderr:
            return {}
        raise Unreachable(squeue.stderr.strip())
    states = {}
    for line in squeue.stdout.splitlines():
        job, state, restarts, *reason = line.split()
        if job in requested:
            states[job] = JobState(state, int(restarts), " ".join(reason))
    return states


def last_state(job: str) -> str | None:
    """Return the final state of a job that left the queue; `None` if the site has no accounting."""
    try:
        sacct = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State",
                     f"--jobs={job}")  # fmt: skip
    except Unreachable:
        return None
    return sacct.stdout.split()[0] if sacct.returncode == 0 and sacct.stdout.split() else None


def cancel_jobs(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are ignored.

    Raises:
        UserError: Slurm refuses.
    """
    try:
        scancel = _run("scancel", *ids)
    except Unreachable as error:
        raise UserError(f"scancel: {error}") from error
    if scancel.returncode and "Invalid job id" not in scancel.stderr:
        raise UserError(f"scancel: {scancel.stderr.strip()}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise Unreachable(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{command[0]} has not answered for {TIMEOUT_S} s") from error
