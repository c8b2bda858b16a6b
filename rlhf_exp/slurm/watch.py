"""Waits for submitted jobs: results from files, states from the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_exp.slurm import queue
from rlhf_exp.slurm.queue import JobState, Unreachable
from rlhf_exp.slurm.results import Result, first_error, read_result, tail
from rlhf_exp.slurm.submission import Job, Submission

# A job may be between two states for a moment, and a file system slower than Slurm.
LOOKS = 3


@dataclass(frozen=True)
class Failure:
    """A job that has failed.

    Attributes:
        job: The job.
        error: Its traceback, or how Slurm ended it and what it printed last.
        log: File with all that it printed.
    """

    job: Job
    error: str
    log: str

    @property
    def reason(self) -> str:
        """The error's last line."""
        return self.error.strip().splitlines()[-1] if self.error.strip() else "unknown"


Ending = Result | Failure


def wait(
    jobs: Sequence[tuple[Submission, Job]],
    poll_s: float,
    tell: Callable[[str], None],
    on_end: Callable[[Job, Ending], None],
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
            states = queue.states(job.id for _, job in left)
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


def ending_of(where: Submission, job: Job, state: JobState | None) -> Ending:
    """Return how a job that is no longer in the queue, or in a last state, has ended."""
    ending = _ending(where, job, state, given_up=True)
    assert ending is not None
    return ending


def _ending(where: Submission, job: Job, state: JobState | None, given_up: bool) -> Ending | None:
    found = first_error(where.results, job.id, job.ranks)
    if found is not None:
        rank, error = found
        return Failure(job, error, str(where.log(job, rank)))
    result = read_result(where.results, job.id)
    if result is not None or not given_up:
        return result
    log = where.log(job)
    how = (state.state if state is not None else queue.last_state(job.id)) or "unknown to Slurm"
    printed = tail(log)
    text = f"{printed}\njob {job.id} has ended without a result (state: {how})".strip()
    return Failure(job, text, str(log))


def _say(
    job: Job,
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
