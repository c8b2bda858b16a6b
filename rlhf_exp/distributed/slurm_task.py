"""The Slurm job that this process is a task of."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

TIMEOUT_S = 60


@dataclass(frozen=True)
class SlurmTask:
    """A task of a job.

    Attributes:
        job: Slurm's number of the job, such as `12`, or `12_3` for one of an array.
        rank: Number of this task; 0 acts for all.
        nodes: Number of machines of the job.
        restarts: How often the job has been started again.
    """

    job: str
    rank: int
    nodes: int
    restarts: int

    def requeue(self) -> None:
        """Let Slurm end the job and start it again later.

        Raises:
            OSError, subprocess.SubprocessError: Slurm does not do it.
        """
        subprocess.run(["scontrol", "requeue", self.job], check=True, timeout=TIMEOUT_S)


def slurm_task() -> SlurmTask:
    """Return the task that this process is."""
    values = os.environ
    job = values["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in values:
        job = f"{values['SLURM_ARRAY_JOB_ID']}_{values['SLURM_ARRAY_TASK_ID']}"
    return SlurmTask(
        job,
        rank=int(values.get("SLURM_PROCID", "0")),
        nodes=int(values.get("SLURM_JOB_NUM_NODES", "1")),
        restarts=int(values.get("SLURM_RESTART_COUNT", "0")),
    )
