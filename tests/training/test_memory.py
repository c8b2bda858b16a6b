"""Peaks of memory, phase by phase."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from rlhf_exp.processes.failures import FailedElsewhere
from rlhf_exp.training.memory import (
    device_peak_bytes,
    forget_peaks,
    host_bytes,
    host_peak_bytes,
    memory_metrics,
    memory_phase,
)

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    forget_peaks()
    yield
    forget_peaks()


def hold(mib: int) -> None:
    block = torch.ones(mib * MIB // 4)
    del block


def test_a_phase_of_the_processor_has_the_peak_that_it_raised() -> None:
    before = host_bytes()
    with memory_phase("updating", CPU):
        with memory_phase("sampling", CPU):
            hold(60)
        with memory_phase("scoring", CPU):
            pass
        hold(160)
    metrics = memory_metrics(CPU)
    sampling = metrics["memory/sampling_bytes"] - before
    updating = metrics["memory/updating_bytes"] - before
    assert 50 * MIB < sampling < 110 * MIB
    assert 150 * MIB < updating < 210 * MIB
    assert "memory/scoring_bytes" not in metrics, "it raised nothing"
    assert metrics["memory/peak_bytes"] == metrics["memory/updating_bytes"] == host_peak_bytes()


def test_memory_of_another_process_is_that_processs_error() -> None:
    """It tells the reason itself, and what it had of its device; this one only ends."""
    text = "process 0 failed: CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(FailedElsewhere), memory_phase("scoring", CPU):
        raise FailedElsewhere(text)


def test_a_thread_beside_the_phases_is_theirs() -> None:
    def score() -> None:
        with memory_phase("scoring", CPU):
            hold(60)

    with memory_phase("sampling", CPU):
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    metrics = memory_metrics(CPU)
    assert "memory/scoring_bytes" not in metrics
    assert "memory/sampling_bytes" in metrics


class Gpu:
    """A GPU's counters of memory: what tensors take, and the most since they were reset."""

    def __init__(self) -> None:
        self.now = self.highest = 0

    def take(self, size: int) -> None:
        self.now += size
        self.highest = max(self.highest, self.now)

    def reset(self, device: object = None) -> None:
        self.highest = self.now


def test_each_phase_of_a_gpu_is_measured_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = Gpu(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: gpu.highest)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: 2 * gpu.highest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    with memory_phase("updating", device):
        gpu.take(10)
        with memory_phase("sampling", device):
            gpu.take(90)
            gpu.take(-90)
        with memory_phase("scoring", device):
            gpu.take(15)
            gpu.take(-15)
        gpu.take(30)
        gpu.take(-40)
    assert memory_metrics(device) == {
        "memory/peak_bytes": 100.0,  # also after the later phases were measured afresh
        "memory/reserved_bytes": 200.0,
        "memory/sampling_bytes": 100.0,
        "memory/scoring_bytes": 25.0,
        "memory/updating_bytes": 40.0,
    }
    forget_peaks()
    assert device_peak_bytes() == 0
    assert set(memory_metrics(device)) == {"memory/peak_bytes", "memory/reserved_bytes"}
