from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_exp import hardware
from rlhf_exp.hardware import linear_rates, machine_limits, processor_has_bf16, processor_name

CPU = torch.device("cpu")


class Clock:
    """Time that passes only while a linear layer computes: so many FLOP a second by format."""

    def __init__(self, rates: dict[torch.dtype, float]) -> None:
        self.rates, self.now = rates, 0.0

    def perf_counter(self) -> float:
        return self.now

    def linear(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, (outputs, inputs) = len(states), weight.shape
        self.now += 2 * rows * inputs * outputs / self.rates[weight.dtype]
        assert states.dtype is weight.dtype
        return torch.zeros(rows, outputs, dtype=weight.dtype)


def test_rates_are_operations_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({torch.float32: 90e9, torch.bfloat16: 200e9})
    monkeypatch.setattr(hardware, "time", clock)
    monkeypatch.setattr(hardware, "linear", clock.linear)
    rates = linear_rates(64, 192, CPU)
    assert rates == pytest.approx({"float32": 90e9, "bfloat16": 200e9})
    assert clock.now < 1.0


def test_limits_of_this_machine() -> None:
    limits = machine_limits(CPU, 64)
    assert set(limits.flops) == {"float32", "bfloat16"}
    # Of any processor of the last 20 years, and of any that will be built in the next 20.
    assert all(1e8 < rate < 1e15 for rate in limits.flops.values())
    assert 1e8 < limits.bandwidth < 1e13
    assert limits.memory > 1 << 28
    assert processor_name() in limits.device


def test_the_processor_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", info)
    assert processor_has_bf16() is None, "no such file: another system"
    info.write_text("processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx512_bf16 sse\n")
    assert (processor_name(), processor_has_bf16()) == ("Fast 9000", True)
    info.write_text("model name\t: Old 1\nflags\t\t: fpu avx2 sse\n")
    assert (processor_name(), processor_has_bf16()) == ("Old 1", False)
    info.write_text("Features\t: fp asimd bf16\n")
    assert processor_has_bf16() is True
