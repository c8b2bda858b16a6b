"""What a job does: one point of a multirun, or what several points share."""

from __future__ import annotations

import subprocess
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_exp.config.load import from_dict
from rlhf_exp.distributed.failure import WorkerGone
from rlhf_exp.distributed.member import HELD_S
from rlhf_exp.distributed.slurm_task import SlurmTask, slurm_task
from rlhf_exp.errors import UserError, WorkerSpent
from rlhf_exp.experiment import UNNAMED
from rlhf_exp.slurm.notice import exit_now, noticing, say
from rlhf_exp.store.records import Records, Status
from rlhf_exp.study.job import run_job


@dataclass(frozen=True)
class Work:
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


def perform(work: Work) -> float | None:
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

    def __init__(self, work: Work, task: SlurmTask) -> None:
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
