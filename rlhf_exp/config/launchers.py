"""Config of Hydra's launchers: `hydra/launcher=slurm`, `local` and `parallel`.

These are the schemas behind `conf/hydra/launcher/`. They belong to Hydra's own section, so nothing
of them is in a key of the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SLURM_LAUNCHER = "hydra_plugins.rlhf_exp_slurm.SlurmLauncher"
LOCAL_LAUNCHER = "hydra_plugins.rlhf_exp_local.LocalLauncher"


@dataclass
class SlurmConfig:
    """A site's Slurm, and the behaviour of jobs there.

    Attributes:
        partition: Slurm's partition; None: the site's default.
        account: Account that is charged.
        qos: Quality of service.
        constraint: Features that nodes must have.
        gpus_per_node: GPUs of a node, and so the most processes on one; 0: jobs without GPUs.
        gpu_type: Type of GPU as the site names it, such as `a100`.
        processes_per_node: Most processes on a node; None: one for each GPU, or all on one node.
        cpus_per_process: Processor cores of each process.
        mem_gb: Memory of each node in GB; None: the site's default.
        time_min: Time limit of a job in minutes; a job that reaches it is started again.
        shared_time_min: Time limit of jobs whose results several points share; None: `time_min`.
        shared_partition: Partition of those jobs; None: `partition`.
        concurrent_jobs: Most jobs of a multirun that run at the same time.
        setup: Shell lines before the program, such as `module load cuda`.
        sbatch: Further options of sbatch, by name without the dashes.
        srun: Further arguments of srun.
        interpreter: Python of the jobs; None: the one that submits.
        offline: Whether nodes have no network: hub ids must be in the cache, see `rlhf-exp fetch`.
        signal_delay_s: Seconds before the time limit at which Slurm gives notice.
        grace_s: Seconds after a notice to reach a point where a checkpoint can be saved.
        max_restarts: Starts of one job after the first; then it fails.
        save_each_iteration: Whether PPO saves after every iteration, whatever
            `ppo.checkpoint_every` says, so that a notice loses one iteration at most.
        poll_s: Seconds between two looks at the queue while `launch.py` waits.
    """

    _target_: str = SLURM_LAUNCHER
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int = 8
    gpu_type: str | None = None
    processes_per_node: int | None = None
    cpus_per_process: int = 8
    mem_gb: float | None = None
    time_min: int = 1440
    shared_time_min: int | None = None
    shared_partition: str | None = None
    concurrent_jobs: int = 16
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    interpreter: str | None = None
    offline: bool = True
    signal_delay_s: int = 120
    grace_s: float = 10.0
    max_restarts: int = 200
    save_each_iteration: bool = True
    poll_s: float = 10.0


@dataclass
class LocalConfig:
    """Jobs of a multirun on this machine.

    Attributes:
        n_jobs: Jobs that run at the same time; -1: as many as cores and GPUs allow.
    """

    _target_: str = LOCAL_LAUNCHER
    n_jobs: int = 1
