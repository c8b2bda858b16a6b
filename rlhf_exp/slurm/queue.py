"""Slurm's queue: what state jobs are in, and how to cancel them.

Only `squeue`, `scancel` and, where it works, `sacct` are asked: a site without accounting has no
`sacct`, and `squeue` forgets a finished job after some minutes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_exp.errors import UserError

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


def states(ids: Iterable[str]) -> dict[str, JobState]:
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


def cancel(ids: Sequence[str]) -> None:
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
