"""Where this process stands: alone, or one of several that something else has started.

The only reader of the variables that torchrun, `accelerate launch`, Slurm and submitit set. Nothing
heavy is imported: every command asks.

The GPUs that this process sees, by the names that `CUDA_VISIBLE_DEVICES` knows them by.

The Slurm job that this process is a task of.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_exp.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = (15000, 45000)
"""Ports derived from a Slurm job's number."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """One of several processes that were started together.

    Attributes:
        rank: Its number, from 0.
        processes: How many there are, over all machines.
        local_rank: Its number on its machine: which device it uses.
        local_processes: How many there are on its machine.
        address: Machine of rank 0.
        port: Port at which they meet there.
        starter: What started them, for messages.
        cluster: Whether they are a cluster's job. One that exits early would end it for good, and
            SIGTERM means that it is being ended: rank 0 alone decides what becomes of it.
    """

    rank: int
    processes: int
    local_rank: int
    local_processes: int
    address: str
    port: int
    starter: str = field(compare=False)
    cluster: bool = field(compare=False, default=False)

    def export(self) -> None:
        """Set the variables that torch, accelerate and DeepSpeed read."""
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_launch_environment() -> LaunchEnvironment | None:
    """Return where this process stands among others, or `None` if it was started alone.

    Raises:
        UserError: The variables that say so are incomplete.
    """
    values = os.environ
    if "RANK" in values or "WORLD_SIZE" in values:
        return _of_torchrun(values)
    if "SUBMITIT_EXECUTOR" in values:
        return _of_submitit()
    # SLURM_NTASKS is also set in the shell of an allocation, where nobody else would come. A step
    # of one task (`srun --pty bash`) is a machine of one's own.
    if int(values.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _of_step(values)
    return None


def leads() -> bool:
    """Whether this process speaks to the user: it is alone, or of rank 0."""
    place = find_launch_environment()
    return place is None or not place.rank


def leave() -> None:
    """Forget the variables: this process works alone although something has started it."""
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_each(asked: int | None, here: int) -> int:
    """Return the number of threads of one process.

    Args:
        asked: What the config says, if it does.
        here: Number of processes on this machine.
    """
    given = os.environ.get("SLURM_CPUS_PER_TASK") if here > 1 else None
    return asked or (int(given) if given else max(1, cores() // here))


def _of_torchrun(values: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in TORCHRUN if name not in values]
    if missing:
        there = ", ".join(name for name in TORCHRUN if name in values)
        raise UserError(
            f"the environment has {there}, as if torchrun had started this process, but not "
            f"{', '.join(missing)}; start with torchrun or `accelerate launch`, or unset them"
        )
    processes = int(values["WORLD_SIZE"])
    return LaunchEnvironment(
        rank=int(values["RANK"]),
        processes=processes,
        local_rank=int(values["LOCAL_RANK"]),
        local_processes=int(values.get("LOCAL_WORLD_SIZE", processes)),
        address=values["MASTER_ADDR"],
        port=int(values["MASTER_PORT"]),
        starter="torchrun (or what set RANK and WORLD_SIZE)",
    )


def _of_submitit() -> LaunchEnvironment:
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    return LaunchEnvironment(
        rank=found.rank,
        processes=found.world_size,
        local_rank=found.local_rank,
        local_processes=found.local_world_size,
        address=found.master_addr,
        port=found.master_port,
        starter="the Slurm job",
        cluster=True,
    )


def _of_step(values: Mapping[str, str]) -> LaunchEnvironment:
    processes = int(values["SLURM_STEP_NUM_TASKS"])
    nodes = int(values.get("SLURM_STEP_NUM_NODES", "1"))
    low, high = PORTS
    # Steps of one job may run side by side.
    number = int(values["SLURM_JOB_ID"]) * 31 + int(values.get("SLURM_STEP_ID", "0"))
    return LaunchEnvironment(
        rank=int(values["SLURM_PROCID"]),
        processes=processes,
        local_rank=int(values["SLURM_LOCALID"]),
        local_processes=-(-processes // nodes),
        address=_first_host(values.get("SLURM_STEP_NODELIST") or values["SLURM_JOB_NODELIST"]),
        port=low + number % (high - low),
        starter=f"a Slurm step of {processes} tasks",
    )


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's short notation, such as `gpu[01-04]`.

    Raises:
        UserError: Slurm's own command, which reads it, is not to be had.
    """
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"`{' '.join(command)}` failed ({error}); the tasks of a Slurm step need it to find "
            "each other. Or start with torchrun"
        ) from error
    return found.stdout.split()[0]


VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """Return the names of the visible GPUs; none on a machine without.

    torch counts them without taking them into use.
    """
    given = os.environ.get(VISIBLE)
    if given == "":
        return []
    import torch  # late: seconds, for processes that otherwise only wait for others

    count = torch.cuda.device_count()
    # What stands behind the first name that is none is not visible, so the first ones count.
    names = map(str, range(count)) if given is None else given.split(",")[:count]
    return [name.strip() for name in names]


def cuda_visible_devices(devices: list[str]) -> dict[str, str]:
    """Return the variables of a process that is to see these GPUs; none: no variables."""
    return {VISIBLE: ",".join(devices)} if devices else {}


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
