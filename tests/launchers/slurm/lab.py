"""Small runs on the tests' Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rlhf_exp.launchers.slurm.submissions import Submission, SubmittedJob, latest_jobs
from tests.lab import LAUNCH, small
from tests.launchers.slurm.cluster import Cluster, wait

SITE = (
    "hydra/launcher=slurm",
    "hydra.launcher.gpus_per_node=0",
    "hydra.launcher.cpus_per_process=1",
    "hydra.launcher.time_min=20",
    "hydra.launcher.poll_s=0.3",
)


class Launch:
    """`launch.py` with small sizes on Slurm, in a process of its own.

    Args:
        cluster: Where the jobs run.
        outputs: The output folder.
        overrides: What differs from the small run.
        program: The `launch.py` to run.
    """

    def __init__(
        self, cluster: Cluster, outputs: Path, *overrides: str, program: Path = LAUNCH
    ) -> None:
        flags = [text for text in overrides if text.startswith("-")]
        rest = [text for text in overrides if not text.startswith("-")]
        self.outputs = outputs
        self.process = subprocess.Popen(
            [sys.executable, str(program), *flags, *small(outputs, *SITE, *rest)],
            cwd=outputs.parent,
            env={**os.environ, **cluster.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, seconds: float = 120) -> tuple[int, str]:
        """Wait for the end; return exit code and what was printed."""
        try:
            printed, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            printed, _ = self.process.communicate()
            raise AssertionError(f"not ended after {seconds} s:\n{printed}") from None
        return self.process.returncode, printed

    def jobs(self, name: str) -> list[tuple[Submission, SubmittedJob]]:
        """Return the jobs that have been submitted under a name."""
        return list(latest_jobs(self.outputs, name))


SCORER = """\
import os
import time

def score(prompts, responses):
    time.sleep(float(os.environ.get("SCORER_PAUSE", "0")))
    return [len(set(response)) / 10 for response in responses]
"""


def paced(folder: Path) -> list[str]:
    """Return overrides of a PPO run of six iterations, each as long as `SCORER_PAUSE` says."""
    file = folder / "scorer.py"
    file.write_text(SCORER)
    return [
        "stage=ppo",
        f"ppo.reward.function={file}:score",
        "ppo.steps=12",
        "ppo.eval_every=12",
        "ppo.select=last",
        "tracking=offline",
    ]


class InQueue(NamedTuple):
    """A job in the queue; `raw` is the number that a job of an array has besides `12_3`."""

    state: str
    restarts: int
    raw: str
    node: str


def states(cluster: Cluster) -> dict[str, InQueue]:
    """Return every job in the queue, by number."""
    columns = "JobArrayID:40,State:30,RestartCnt:10,JobID:20,NodeList:40"
    printed = cluster.output("squeue", "--noheader", "--array", "--states=all", f"-O{columns}")
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: InQueue(row[1], int(row[2]), row[3], (*row, "")[4]) for row in rows}


def give_notice(cluster: Cluster, where: Submission, job: SubmittedJob) -> None:
    """Send USR2 to a running job, once, and wait until it says so."""
    log = where.log(job)
    noticed = log.read_text().count("gives notice")
    command = ["scancel", "--signal=USR2", states(cluster)[job.id].raw]
    # For a job of an array, this version takes a signal that it has sent for one to be sent again.
    with subprocess.Popen(command, env=cluster.environment, stderr=subprocess.DEVNULL) as sender:
        wait(lambda: log.read_text().count("gives notice") > noticed, 30)
        sender.kill()


def checkpoints(outputs: Path, stage: str, key: str) -> list[Path]:
    """Return the checkpoints of a run that is under way."""
    return list((outputs / "store" / ".staging").glob(f"{stage}-{key}*/checkpoints/*"))
