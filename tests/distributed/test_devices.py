from __future__ import annotations

import pytest
import torch

from rlhf_exp.distributed.devices import only, visible_devices


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
    assert only(["3", "GPU-8a"]) == {"CUDA_VISIBLE_DEVICES": "3,GPU-8a"}
    assert only([]) == {}, "without GPUs nothing changes"
