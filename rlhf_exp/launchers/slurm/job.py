"""A task of a Slurm job: `python -m rlhf_exp.launchers.slurm.job FOLDER`, with submitit's folder.

Slurm sends a notice (USR2) to every process of a job that has to go: before its time limit, or for
a more urgent job. A signal that nothing handles kills. So USR2 stays blocked in the main process
and in everything it starts, and one thread of the main process waits for it: a notice that comes
early is not lost, and no child acts on one.

Nothing that this module imports at its head may start threads, as torch and NumPy do: a thread
started before notices are blocked does not inherit the block.
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
from rlhf_exp.launchers.run_job import run_job
from rlhf_exp.processes.environment import SlurmTask, slurm_task
from rlhf_exp.processes.failures import WorkerGone, exit_after
from rlhf_exp.processes.worker import HELD_S
from rlhf_exp.redaction import install
from rlhf_exp.store.run_records import Records, Status

NOTICE_SIGNAL = signal.SIGUSR2


def main(folder: str) -> int:
    """Run the function that submitit has stored for this job."""
    block_notices()
    install()
    from submitit.core.submission import process_job

    from rlhf_exp.launchers.slurm.submissions import remove_result

    task = slurm_task()
    remove_result(Path(folder), task.job, task.rank)
    process_job(folder)
    return 0


@dataclass(frozen=True)
class JobWork:
    """The work of one job as it was submitted, independent of later changes to config files.

    Attributes:
        config: The config as plain values.
        overrides: The command line, for the record.
        key: The key of its last step, as planned at submission.
        recorded: Whether it is a point, with a record and a report; else stages that points share.
        grace_s: Seconds after a notice in which a checkpoint can be saved.
        max_restarts: Most starts after the first.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...]
    key: str
    recorded: bool
    grace_s: float
    max_restarts: int


def perform(work: JobWork) -> float | None:
    """Run a job's work; submitit calls it in every task of the job.

    Returns:
        The objective.

    Raises:
        UserError: Something the user can mend.
    """
    task = slurm_task()
    config, overrides = from_dict(work.config), list(work.overrides)
    if task.rank:
        # The first task handles notices; here they stay blocked.
        return run_job(config, overrides, recorded=work.recorded, logged=False)
    if task.restarts:
        log_line(f"job {task.job} starts again ({task.restarts} of {work.max_restarts})")
    requeue = _Requeue(work, task)
    with handle_notices(work.grace_s, requeue.requeue_and_exit) as notice:
        try:
            return run_job(config, overrides, recorded=work.recorded, logged=False)
        except BaseException as error:
            # After a notice, any other error is a consequence of it: another task may be dead
            # already. An error that is not will happen again after the restart.
            if notice.is_set():
                requeue.requeue_and_exit()
            if isinstance(error, WorkerSpent):
                log_line(str(error))
                requeue.requeue_and_exit()
            if isinstance(error, WorkerGone) and task.nodes > 1:
                traceback.print_exc()
                await_slurm("a machine may have died; Slurm starts the job again if so")
            raise


class _Requeue:
    """Requeues a job in its first task; the first of two threads that call it does so."""

    def __init__(self, work: JobWork, task: SlurmTask) -> None:
        self.work, self.task = work, task
        self.lock = threading.Lock()

    def requeue_and_exit(self) -> None:
        """Requeue the job and end this process."""
        self.lock.acquire()  # for good: the process ends here
        if self.task.restarts >= self.work.max_restarts:
            log_line(
                f"not started again: hydra.launcher.max_restarts={self.work.max_restarts} reached"
            )
            exit_now()
        with suppress(OSError, UserError):
            self._record_requeued()
        try:
            self.task.requeue()
        except (OSError, subprocess.SubprocessError) as error:
            # A job that is preempted is requeued by Slurm itself when it is killed, not if it ends.
            await_slurm(f"scontrol requeue {self.task.job}: {error}")
        exit_now()

    def _record_requeued(self) -> None:
        """Write into the run's record that it will go on later."""
        # Late: it imports torch, whose threads must start after notices are blocked.
        from rlhf_exp.experiment import UNNAMED

        config = from_dict(self.work.config)
        records = Records(Path(config.output_dir) / "sweeps")
        for record in records.sweep(config.name or UNNAMED):
            if record.key == self.work.key and self.work.recorded:
                records.write(replace(record, status=Status.requeued, error=None))


def block_notices() -> None:
    """Block notices for `handle_notices`; call it before any other thread exists."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {NOTICE_SIGNAL})


@contextmanager
def handle_notices(grace_s: float, leave: Callable[[], None]) -> Iterator[threading.Event]:
    """Turn a notice into Ctrl-C, which saves a checkpoint if it can; exit after `grace_s`.

    Args:
        grace_s: Seconds after the notice in which the block may end by itself.
        leave: Called in another thread after that; ends the process.

    Yields:
        An event that is set as soon as a notice has come.
    """
    noticed, over = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        signal.sigwait({NOTICE_SIGNAL})
        if over.is_set():
            return
        noticed.set()
        log_line("Slurm gives notice: leaving, to go on later")
        signal.pthread_kill(main, signal.SIGINT)
        if not over.wait(grace_s):
            leave()

    thread = threading.Thread(target=wait, name="notice", daemon=True)
    thread.start()
    try:
        yield noticed
    finally:
        over.set()
        if not noticed.is_set() and thread.ident is not None:
            signal.pthread_kill(thread.ident, NOTICE_SIGNAL)
        thread.join()
        signal.signal(signal.SIGINT, before)


def await_slurm(reason: str) -> None:
    """Wait until Slurm ends the job: a job that ends by itself is not started again."""
    log_line(f"{reason}; waiting to be ended")
    time.sleep(HELD_S)


def log_line(text: str) -> None:
    """Print a line with the time into the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def exit_now() -> None:
    """Exit without the exit handlers of libraries, which may wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1]))
