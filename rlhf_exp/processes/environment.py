"""The launch environment of this process: its rank and peers, its GPUs, its Slurm task.

Only this module reads the variables that torchrun, `accelerate launch`, Slurm and submitit set. It
imports nothing heavy, because every command calls it.
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
    """The place of a process among several that were started together.

    Attributes:
        rank: Number of the process, from 0.
        processes: Number of processes on all machines.
        local_rank: Number of the process on its machine, by which it takes its GPU (`own_gpu`).
        local_processes: Number of processes on its machine.
        address: Machine of rank 0.
        port: Port of the rendezvous on that machine.
        starter: The program that started the processes, for messages.
        cluster: Whether the processes are a cluster's job. A process that exits early would end the
            job for good, and SIGTERM means that the job is being ended: rank 0 alone decides.
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
    """Return the launch environment of this process, or `None` if it was started alone.

    Raises:
        UserError: Some of the variables are missing.
    """
    variables = os.environ
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _from_torchrun(variables)
    if "SUBMITIT_EXECUTOR" in variables:
        return _from_submitit()
    # SLURM_NTASKS is also set in the shell of an allocation, where no other task would join. A step
    # of one task (`srun --pty bash`) is a machine of one's own.
    if _whole(variables, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_slurm_step(variables)
    return None


def is_leader() -> bool:
    """Whether this process is alone or rank 0, and so the one that talks to the user."""
    environment = find_launch_environment()
    return environment is None or not environment.rank


def clear_torchrun_variables() -> None:
    """Unset torchrun's variables, for a process that works alone although torchrun started it."""
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(configured: int | None, local_processes: int) -> int:
    """Return the number of CPU threads of one process.

    Args:
        configured: The number in the config, if there is one.
        local_processes: Number of processes on this machine.
    """
    task_cores = os.environ.get("SLURM_CPUS_PER_TASK") if local_processes > 1 else None
    if configured or not task_cores:
        return configured or max(1, cores() // local_processes)
    return _whole(os.environ, "SLURM_CPUS_PER_TASK")


def _whole(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable's whole number, or the default where it is not set.

    Raises:
        UserError: It is none.
    """
    value = variables.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isascii() or not value.isdecimal():
        raise UserError(
            f"the environment has {name}={value or ''}, which is no whole number; what starts "
            "several processes sets it, so start with that, or unset it"
        )
    return int(value)


def _from_torchrun(variables: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in TORCHRUN if name not in variables]
    if missing:
        present = ", ".join(name for name in TORCHRUN if name in variables)
        raise UserError(
            f"the environment has {present}, as if torchrun had started this process, but not "
            f"{', '.join(missing)}; start with torchrun or `accelerate launch`, or unset them"
        )
    rank, processes = _whole(variables, "RANK"), _whole(variables, "WORLD_SIZE")
    if rank >= processes:
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={processes}, and ranks begin at 0; "
            "start with torchrun or `accelerate launch`, or unset them"
        )
    return LaunchEnvironment(
        rank=rank,
        processes=processes,
        local_rank=_whole(variables, "LOCAL_RANK"),
        local_processes=_whole(variables, "LOCAL_WORLD_SIZE", processes),
        address=variables["MASTER_ADDR"],
        port=_whole(variables, "MASTER_PORT"),
        starter="torchrun (or what set RANK and WORLD_SIZE)",
    )


def _from_submitit() -> LaunchEnvironment:
    from submitit.helpers import TorchDistributedEnvironment

    task = TorchDistributedEnvironment()
    return LaunchEnvironment(
        rank=task.rank,
        processes=task.world_size,
        local_rank=task.local_rank,
        local_processes=task.local_world_size,
        address=task.master_addr,
        port=task.master_port,
        starter="the Slurm job",
        cluster=True,
    )


def _from_slurm_step(variables: Mapping[str, str]) -> LaunchEnvironment:
    processes = int(variables["SLURM_STEP_NUM_TASKS"])
    nodes = int(variables.get("SLURM_STEP_NUM_NODES", "1"))
    hosts = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
    low, high = PORTS
    # Steps of one job may run side by side.
    number = int(variables["SLURM_JOB_ID"]) * 31 + int(variables.get("SLURM_STEP_ID", "0"))
    return LaunchEnvironment(
        rank=int(variables["SLURM_PROCID"]),
        processes=processes,
        local_rank=int(variables["SLURM_LOCALID"]),
        local_processes=-(-processes // nodes),
        address=_first_host(hosts),
        port=low + number % (high - low),
        starter=f"a Slurm step of {processes} tasks",
    )


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's short notation, such as `gpu[01-04]`.

    Raises:
        UserError: Slurm's own command that expands it is missing or fails.
    """
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"`{' '.join(command)}` failed ({error}); the tasks of a Slurm step need it to find "
            "each other. Or start with torchrun"
        ) from error
    return listing.stdout.split()[0]


def own_gpu(local_rank: int) -> int:
    """Return the number of a process's GPU among those that it sees; there must be one.

    Where each process sees GPUs of its own (`srun --gpus-per-task=1`), their numbers begin anew in
    each.

    Args:
        local_rank: Number of the process on its machine.
    """
    import torch  # late, as below

    return local_rank % torch.cuda.device_count()


# Variables that launchers set for their processes, and Python's own, which would mix two worlds.
_NOT_PASSED = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("SLURM_", "PYTHON"),
)


def worker_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker in another interpreter: alone, offline, no tracker."""
    kept = {name: value for name, value in variables.items() if not name.startswith(_NOT_PASSED)}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}


VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """Return the names of the visible GPUs, as in `CUDA_VISIBLE_DEVICES`; empty without GPUs.

    torch counts the devices without initialising them.
    """
    listed = os.environ.get(VISIBLE)
    if listed == "":
        return []
    import torch  # late: seconds, for processes that otherwise only wait for others

    count = torch.cuda.device_count()
    # CUDA ignores all names after the first invalid one, so the first `count` names are visible.
    names = map(str, range(count)) if listed is None else listed.split(",")[:count]
    return [name.strip() for name in names]


def cuda_visible_devices(devices: list[str]) -> dict[str, str]:
    """Return the variables of a process that sees only these GPUs; empty for no GPUs."""
    return {VISIBLE: ",".join(devices)} if devices else {}


TIMEOUT_S = 60


@dataclass(frozen=True)
class SlurmTask:
    """A task of a Slurm job.

    Attributes:
        job: Slurm's number of the job, such as `12`, or `12_3` for a job of an array.
        rank: Number of this task; task 0 acts for all.
        nodes: Number of machines of the job.
        restarts: Number of times that the job has been started again.
    """

    job: str
    rank: int
    nodes: int
    restarts: int

    def requeue(self) -> None:
        """Let Slurm end the job and start it again later.

        Raises:
            OSError, subprocess.SubprocessError: Slurm cannot be called or refuses.
        """
        subprocess.run(["scontrol", "requeue", self.job], check=True, timeout=TIMEOUT_S)


def slurm_task() -> SlurmTask:
    """Return this process's Slurm task."""
    variables = os.environ
    job = variables["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in variables:
        job = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return SlurmTask(
        job,
        rank=int(variables.get("SLURM_PROCID", "0")),
        nodes=int(variables.get("SLURM_JOB_NUM_NODES", "1")),
        restarts=int(variables.get("SLURM_RESTART_COUNT", "0")),
    )
