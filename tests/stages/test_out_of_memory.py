"""Memory that runs out: the phase is found, and the error says what makes room in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.stages.out_of_memory import explained
from rlhf_exp.training.memory import (
    OutOfMemory,
    Phase,
    forget_peaks,
    memory_metrics,
    memory_phase,
)
from rlhf_exp.training.ppo import ExperienceCollector
from tests.lab import small_config

HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has ...")
GIB = 1 << 30


def text_of(config: Config, stage: str, phase: Phase, error: Exception) -> str:
    """Return what a user reads where memory runs out in a phase, on the process's device."""
    device = torch.device("cuda", 1) if torch.cuda.is_initialized() else torch.device("cpu")
    with pytest.raises(UserError) as raised, explained(config, stage), memory_phase(phase, device):
        raise error
    return str(raised.value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process has the second of two GPUs."""
    numbers = {"memory_allocated": 60 * GIB, "memory_reserved": 70 * GIB}
    numbers |= {"max_memory_allocated": 60 * GIB, "max_memory_reserved": 70 * GIB}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 2, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("phase", "words", "overrides"),
    [
        ("sampling", "it sampled responses", "ppo.generation.batch=8 (now 16)"),
        ("scoring", "responses were scored", "ppo.generation.batch=8 (now 16)"),
        ("assessing", "policy and reference read", "ppo.generation.batch=8 (now 16)"),
        ("loading", "it loaded models", "ppo.reward.placement=gpu:1"),
        ("updating", "it computed gradients", "ppo.micro_batch=4 (now 8)"),
    ],
)
def test_of_a_gpu(tmp_path: Path, phase: Phase, words: str, overrides: str) -> None:
    sizes = ["ppo.generation.batch=16", "ppo.batch=8", "ppo.micro_batch=null"]
    text = text_of(small_config(tmp_path, *sizes), "ppo", phase, CUDA)
    assert text.startswith(f"ppo: cuda:1 ran out of memory while {words}")
    assert f"First try {overrides}. " in text
    assert "of its 80.0 GiB this process had reserved 70.0, 60.0 of it for tensors" in text
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in text, "the first line"
    assert ("If that is not enough: ppo.gradient_checkpointing=true." in text) == (
        phase == "updating"
    )


@pytest.mark.usefixtures("gpu")
def test_what_is_chosen_already_is_not_advised(tmp_path: Path) -> None:
    chosen = ["distributed=fsdp", "distributed.processes=2", "ppo.gradient_checkpointing=true"]
    config = small_config(tmp_path, *chosen, "ppo.batch=4", "ppo.micro_batch=1")
    text = text_of(config, "ppo", "updating", CUDA)
    assert "First try distributed.offload=true. plan=true" in text
    text = text_of(small_config(tmp_path, "distributed=ddp", *chosen[1:2]), "sft", "loading", CUDA)
    assert "First try distributed.strategy=fsdp." in text


@pytest.mark.usefixtures("gpu")
def test_what_the_config_refuses_is_not_advised(tmp_path: Path) -> None:
    one = small_config(tmp_path, "distributed=ddp", "distributed.processes=1")
    assert "distributed." not in text_of(one, "sft", "loading", CUDA)
    ahead = small_config(tmp_path, "distributed=ddp", "ppo.generation.ahead=1")
    assert "fsdp" not in text_of(ahead, "ppo", "checkpointing", CUDA)

    several = "ppo.reward.terms=[{model: default}, {length: {target: 5}}]"
    assert "placement" not in text_of(small_config(tmp_path, several), "ppo", "loading", CUDA)


def test_another_place_in_the_same_memory_is_not_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "placement" not in text_of(small_config(tmp_path), "ppo", "loading", HOST)
    several = small_config(tmp_path, "distributed=ddp")
    text = text_of(several, "ppo", "loading", HOST)
    assert "First try ppo.reward.placement=cpu. " in text, "one reward model in place of two"


@pytest.mark.usefixtures("gpu")
def test_what_resumes_is_advised_first(tmp_path: Path) -> None:
    """Only ZeRO, of the same stage, reads ZeRO's checkpoints."""
    text = text_of(small_config(tmp_path, "distributed=zero2"), "sft", "loading", CUDA)
    assert "First try distributed.offload=true. If that is not enough: " in text
    assert "distributed.strategy=fsdp (the stage begins anew)." in text
    text = text_of(small_config(tmp_path, "distributed=ddp"), "sft", "loading", CUDA)
    assert "distributed.strategy=fsdp. If that is not enough: distributed.offload=true." in text


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_cannot_even_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has all of it: the first call fails, and each one after it."""

    def full(device: object) -> NoReturn:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    text = text_of(
        small_config(tmp_path), "ppo", "loading", RuntimeError("CUDA error: out of memory")
    )
    assert text.startswith("ppo: cuda:1 ran out of memory while it loaded models")
    assert "it answers no more (CUDA error: out of memory)" in text


@pytest.mark.usefixtures("gpu")
def test_the_reward_models_own_gpu(tmp_path: Path) -> None:
    """The message is torch's: of the device that is full, which is not the process's own."""
    config = small_config(tmp_path, "ppo.generation.batch=16")
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
    text = text_of(config, "ppo", "scoring", torch.OutOfMemoryError(full))
    assert text.startswith("ppo: cuda:0 ran out of memory while responses were scored")
    assert "First try ppo.generation.batch=8 (now 16). " in text


@pytest.mark.usefixtures("gpu")
def test_host_memory_beside_a_gpu(tmp_path: Path) -> None:
    config = small_config(tmp_path, "distributed=zero2", "distributed.offload=true")
    text = text_of(config, "ppo", "loading", HOST)
    assert text.startswith("ppo: the machine ran out of memory while it loaded models")
    assert "First try distributed.offload=false." in text


@pytest.mark.parametrize("error", [HOST, MemoryError(), CUDA])
def test_of_a_machine_without_gpus(tmp_path: Path, error: Exception) -> None:
    config = small_config(tmp_path, "ppo.generation.batch=3")
    text = text_of(config, "ppo", "sampling", error)
    assert re.search(r"this process had \d+\.\d GiB of host memory", text)
    assert "First try ppo.generation.batch=2 (now 3)." in text


def test_phase_of_stages_without_training(tmp_path: Path) -> None:
    config = small_config(tmp_path, "eval.batch=10")
    found = r"eval: .* it evaluated.*eval\.batch=5 \(now 10\)"
    with pytest.raises(UserError, match=found), explained(config, "eval"):
        raise MemoryError


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="another"),
        explained(small_config(tmp_path), "ppo"),
        memory_phase("sampling", torch.device("cpu")),
    ):
        raise RuntimeError("another")


def test_the_innermost_phase_counts() -> None:
    cpu = torch.device("cpu")
    with (
        pytest.raises(OutOfMemory) as raised,
        memory_phase("updating", cpu),
        memory_phase("scoring", cpu),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space
    assert raised.value.phase == "scoring"


def test_phases_of_collecting() -> None:
    """Sampling, scoring and assessing, each ended by memory, are told apart."""

    def full(*args: Any) -> NoReturn:
        raise MemoryError

    def ready(*args: Any) -> tuple[None, None]:
        return None, None

    steps = {"sampling": "_sample", "scoring": "_score", "assessing": "_compare"}
    for phase, failing in steps.items():
        parts: dict[str, Callable[..., Any]] = dict.fromkeys(steps.values(), ready)
        world = SimpleNamespace(device=torch.device("cpu"))
        stand_in: Any = SimpleNamespace(
            section=None, controller=SimpleNamespace(coef=0.0), world=world, **parts
        )
        setattr(stand_in, failing, full)
        with pytest.raises(OutOfMemory) as raised:
            ExperienceCollector.collect(stand_in, 0, stand_in)
        assert raised.value.phase == phase


def test_metrics_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved memory beside that of tensors; and that of the other GPUs, where there is some."""
    reserved = {0: 1, 1: 30, 2: 4}
    forget_peaks()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 20)
    monkeypatch.setattr(
        torch.cuda, "max_memory_reserved", lambda d: reserved[getattr(d, "index", d)]
    )
    assert memory_metrics(torch.device("cuda", 1)) == {
        "memory/peak_bytes": 20.0,
        "memory/reserved_bytes": 30.0,
        "memory/other_gpus_bytes": 5.0,
    }
    assert set(memory_metrics(torch.device("cpu"))) == {"memory/peak_bytes"}
