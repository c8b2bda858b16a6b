"""A task of a job: `python -m rlhf_exp.launchers.slurm.job FOLDER`, with submitit's folder.

Nothing is imported before notices are blocked: libraries start threads, which would not know of it.

What a job does: one point of a multirun, or what several points share.

Slurm's notice (USR2) that a job has to go: before its time limit, or for a more urgent job.

Slurm signals every process of a job, and a signal that nothing handles kills. So USR2 stays blocked
in the main process and in everything it starts, from its first line on, and one thread of the main
process waits for it: a notice that comes early is not lost, and no child acts on one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_exp.config.compose import from_dict
from rlhf_exp.errors import UserError, WorkerSpent
from rlhf_exp.experiment import UNNAMED
from rlhf_exp.launchers.run_job import run_job
from rlhf_exp.processes.environment import SlurmTask, slurm_task
from rlhf_exp.processes.failures import WorkerGone, exit_after
from rlhf_exp.processes.worker import HELD_S
from rlhf_exp.store.run_records import Records, Status


def main(folder: str) -> int:
    """Run what submitit has stored for this job."""
    block()
    from submitit.core.submission import process_job

    from rlhf_exp.launchers.slurm.submissions import forget
    from rlhf_exp.processes.environment import slurm_task

    task = slurm_task()
    forget(Path(folder), task.job, task.rank)
    process_job(folder)
    return 0


@dataclass(frozen=True)
class JobWork:
    """One job's work, as it was submitted: nothing of it is read from the config files again.

    Attributes:
        config: The config as plain values.
        overrides: The command line, for the record.
        key: The final key, as planned at submission.
        recorded: Whether it is a point with a record and a report of its own.
        grace_s: Seconds after a notice to reach a point where a checkpoint can be saved.
        max_restarts: Starts after the first.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...]
    key: str
    recorded: bool
    grace_s: float
    max_restarts: int


def perform(work: JobWork) -> float | None:
    """Do a work; called by submitit in every task of the job.

    Returns:
        The objective.

    Raises:
        UserError: Something the user can mend.
    """
    task = slurm_task()
    config, overrides = from_dict(work.config), list(work.overrides)
    if task.rank:
        # Notices are the first task's affair; here they stay blocked.
        return run_job(config, overrides, recorded=work.recorded)
    if task.restarts:
        say(f"job {task.job} starts again ({task.restarts} of {work.max_restarts})")
    leaving = _Leaving(work, task)
    with noticing(work.grace_s, leaving.now) as notice:
        try:
            return run_job(config, overrides, recorded=work.recorded)
        except BaseException as error:
            # Once notice is given, whatever else goes wrong is due to it: a neighbour may be dead
            # already. And what is not due to it goes wrong again after the restart.
            if notice.is_set():
                leaving.now()
            if isinstance(error, WorkerSpent):
                say(str(error))
                leaving.now()
            if isinstance(error, WorkerGone) and task.nodes > 1:
                traceback.print_exc()
                await_slurm("a machine may have died; Slurm starts the job again if so")
            raise


class _Leaving:
    """Hands a job back to Slurm, in the first task; by the thread that comes first."""

    def __init__(self, work: JobWork, task: SlurmTask) -> None:
        self.work, self.task = work, task
        self.lock = threading.Lock()

    def now(self) -> None:
        """Requeue the job and end this process."""
        self.lock.acquire()  # for good: the process ends here
        if self.task.restarts >= self.work.max_restarts:
            say(f"not started again: hydra.launcher.max_restarts={self.work.max_restarts} reached")
            exit_now()
        with suppress(OSError, UserError):
            self._note()
        try:
            self.task.requeue()
        except (OSError, subprocess.SubprocessError) as error:
            # A job that is preempted is requeued by Slurm itself when it is killed, not if it ends.
            await_slurm(f"scontrol requeue {self.task.job}: {error}")
        exit_now()

    def _note(self) -> None:
        """Let the record say that the run goes on later."""
        config = from_dict(self.work.config)
        records = Records(Path(config.output_dir) / "sweeps")
        for record in records.sweep(config.name or UNNAMED):
            if record.key == self.work.key and self.work.recorded:
                records.write(replace(record, status=Status.requeued, error=None))


def await_slurm(reason: str) -> None:
    """Hold still until Slurm ends the job: one that ends by itself is not started again."""
    say(f"{reason}; waiting to be ended")
    time.sleep(HELD_S)


SIGNAL = signal.SIGUSR2


def block() -> None:
    """Keep notices for `noticing`; call it before any other thread exists."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


@contextmanager
def noticing(grace_s: float, leave: Callable[[], None]) -> Iterator[threading.Event]:
    """Turn a notice into Ctrl-C, which saves where it can; leave in any case after `grace_s`.

    Args:
        grace_s: Seconds in which the block may end by itself.
        leave: Called in another thread when they are over; ends the process.

    Yields:
        What is set as soon as a notice has come.
    """
    came, over = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        signal.sigwait({SIGNAL})
        if over.is_set():
            return
        came.set()
        say("Slurm gives notice: leaving, to go on later")
        signal.pthread_kill(main, signal.SIGINT)
        if not over.wait(grace_s):
            leave()

    thread = threading.Thread(target=wait, name="notice", daemon=True)
    thread.start()
    try:
        yield came
    finally:
        over.set()
        if not came.is_set() and thread.ident is not None:
            signal.pthread_kill(thread.ident, SIGNAL)
        thread.join()
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Write a line into the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def exit_now() -> None:
    """End this process without the exit handlers of libraries, which may wait for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1]))
