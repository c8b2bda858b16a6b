"""Who started this process: every starter's variables, and those that only look like one's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import (
    LaunchEnvironment,
    clear_torchrun_variables,
    cuda_visible_devices,
    find_launch_environment,
    is_leader,
    threads_per_process,
    visible_devices,
)


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("5,2", 2, ["5", "2"]),
        ("GPU-8a, GPU-1b", 2, ["GPU-8a", "GPU-1b"]),
        ("1,-1,0", 1, ["1"]),  # CUDA ends the list at a name that is none
        ("0,1", 0, []),  # named, but there is no driver
    ],
)
def test_names_of_what_is_visible(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, count: int, names: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_devices() == names


def test_hidden_gpus_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 / 0)
    assert visible_devices() == []


def test_variables_of_a_process() -> None:
    assert cuda_visible_devices(["3", "GPU-8a"]) == {"CUDA_VISIBLE_DEVICES": "3,GPU-8a"}
    assert cuda_visible_devices([]) == {}, "without GPUs nothing changes"


Set = Callable[..., None]

STEP = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "9",
}


@pytest.fixture
def only_variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets the variables given, and no other that a starter sets."""
    starters = ("SLURM", "SUBMITIT", "MASTER", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC")
    for name in list(os.environ):
        if name.startswith(starters):
            monkeypatch.delenv(name)

    def set_them(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `scontrol` that spells the hosts of `gpu[07-08]` out."""
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo "gpu07\ngpu08"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return command


def test_alone(only_variables: Set) -> None:
    assert find_launch_environment() is None
    assert is_leader()


def test_under_torchrun(only_variables: Set) -> None:
    only_variables(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    only_variables(MASTER_ADDR="node1", MASTER_PORT="29400")
    # Inside of a Slurm step of one task a node, too.
    only_variables(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    assert find_launch_environment() == LaunchEnvironment(5, 8, 1, 4, "node1", 29400, "")
    assert not is_leader()


def test_variables_that_are_half_there(only_variables: Set) -> None:
    only_variables(RANK="0", WORLD_SIZE="2", MASTER_ADDR="node1")
    with pytest.raises(UserError, match=r"has RANK, WORLD_SIZE, MASTER_ADDR.*not LOCAL_RANK, MAS"):
        find_launch_environment()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"RANK": "one"}, "RANK=one, which is no whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=, which is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2, and ranks begin at 0"),
    ],
)
def test_variables_that_are_no_numbers(
    only_variables: Set, changed: dict[str, str], complaint: str
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    only_variables(**whole | {"MASTER_PORT": "29500"} | changed)
    with pytest.raises(UserError, match=complaint):
        find_launch_environment()


def test_a_step_of_several_tasks(only_variables: Set, scontrol: Path) -> None:
    only_variables(**STEP)
    environment = find_launch_environment()
    # The port: 15000 + (1000 * 31 + 2) % 30000 = 15000 + 1002.
    assert environment == LaunchEnvironment(3, 4, 1, 2, "gpu07", 16002, "")
    assert "a Slurm step of 4 tasks" in environment.starter


def test_a_step_whose_hosts_cannot_be_found(only_variables: Set, scontrol: Path) -> None:
    only_variables(**STEP)
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"scontrol show hostnames gpu\[07-08\]` failed"):
        find_launch_environment()


def test_shells_in_which_nobody_else_would_come(only_variables: Set) -> None:
    only_variables(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert find_launch_environment() is None, "salloc's shell, or sbatch's script"
    only_variables(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_ID="0")
    assert find_launch_environment() is None, "srun --pty bash"


def test_a_task_of_submitit(only_variables: Set) -> None:
    pytest.importorskip("submitit")
    only_variables(SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_JOB_ID="17", SUBMITIT_LOCAL_NTASKS="2")
    only_variables(
        SUBMITIT_LOCAL_GLOBALID="1", SUBMITIT_LOCAL_LOCALID="1", SUBMITIT_LOCAL_NNODES="1"
    )
    environment = find_launch_environment()
    assert environment is not None
    assert (
        environment.rank,
        environment.processes,
        environment.local_rank,
        environment.local_processes,
    ) == (1, 2, 1, 2)
    only_variables(
        SUBMITIT_LOCAL_NTASKS="1", SUBMITIT_LOCAL_GLOBALID="0", SUBMITIT_LOCAL_LOCALID="0"
    )
    alone = find_launch_environment()
    assert alone is not None, "one task is a worker, too"
    assert (alone.rank, alone.processes) == (0, 1)


def test_leaving_and_exporting(only_variables: Set) -> None:
    only_variables(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    environment = find_launch_environment()
    clear_torchrun_variables()
    assert find_launch_environment() is None
    assert environment is not None
    environment.export()
    assert find_launch_environment() == environment
    clear_torchrun_variables()


def test_threads(only_variables: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_exp.processes.environment.cores", lambda: 8)
    assert [threads_per_process(None, here) for here in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert threads_per_process(5, 2) == 5
    only_variables(SLURM_CPUS_PER_TASK="6")
    assert threads_per_process(None, 4) == 6
