"""Which GPU a process takes, on machines where no GPU is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from rlhf_exp.distributed.world import open_world
from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.processes.worker import process_group


class Machine:
    """A machine whose processes see GPUs by name; `group` enters a process group as one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.store = distributed.FileStore(str(folder / "store"), 1)
        self.set: list[int] = []
        self.visible: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.visible))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda number: SimpleNamespace(uuid=self.visible[number]),
        )
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: self.set.append(number))
        monkeypatch.setattr(distributed, "init_process_group", lambda *args, **kwargs: None)
        monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)

    def group(self, rank: int, visible: list[str], number: int = 1) -> None:
        self.visible = visible
        place = LaunchEnvironment(rank, 2, rank, 2, "127.0.0.1", 0, "the test")
        with process_group(self.store, number, place):
            pass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_all_see_all_gpus(machine: Machine) -> None:
    for rank in (1, 0):
        machine.group(rank, ["a", "b"])
    assert machine.set == [1, 0]


def test_each_sees_a_gpu_of_its_own(machine: Machine) -> None:
    """As under `srun --gpus-per-task=1`; and again in the group of the next stage."""
    for number in (1, 2):
        machine.group(0, ["a"], number)
        machine.group(1, ["b"], number)
    assert machine.set == [0, 0, 0, 0]


def test_two_processes_on_one_gpu(machine: Machine) -> None:
    machine.group(0, ["a"])
    with pytest.raises(UserError, match=r"rank 1 sees under number 0, of 1, is already .* rank 0"):
        machine.group(1, ["a"])


def test_the_device_is_the_one_that_a_task_sees(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    machine.visible = ["a"]
    assert open_world("float32", 1).device == torch.device("cuda", 0)
    machine.visible = ["a", "b", "c", "d"]
    assert open_world("float32", 1).device == torch.device("cuda", 3)
