"""Clipping and stepping; and what a module is made of when DeepSpeed has let go of it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_exp.distributed.strategy import clip_and_step

PROGRAM = """
import os, sys
os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
import torch
from torch import distributed, nn
from rlhf_exp.distributed.deepspeed import Zero
from rlhf_exp.distributed.deepspeed import Zero3

folder, stage, half = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "half"
store = distributed.FileStore(folder + "/store", 1)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
module[0].requires_grad_(False)
before = [p.detach().clone() for p in module.parameters()]
optimizer = torch.optim.AdamW(module[1].parameters(), lr=0.1)
kind = Zero3 if stage == 3 else Zero
zero = kind(module, lambda: optimizer, 1.0, torch.device("cpu"), half, False, stage)
zero.begin(last=True)
dtype = torch.bfloat16 if half else torch.float32
zero.backward(zero.wrapped(torch.ones(2, 8, dtype=dtype)).float().square().mean())
zero.step()
trained = {name: value.clone() for name, value in zero.weights().items()}
frozen = module[0].weight.data_ptr()
zero.release(None, True)
after = dict(module.named_parameters())
assert all(p.dtype == torch.float32 for p in after.values())
assert torch.equal(after["0.weight"], before[0]) and torch.equal(after["0.bias"], before[1])
for name, value in trained.items():
    assert torch.equal(after[name], value), name
    assert not torch.equal(value, before[2 + (name == "1.bias")]), "it has been trained"
    assert after[name].untyped_storage().nbytes() == value.numel() * 4, "a tensor of its own"
same = frozen == after["0.weight"].data_ptr()
print("same" if same else "another")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("stage", "precision", "frozen"),
    [
        (2, "float32", "same"),  # nothing is copied that need not be
        (2, "half", "another"),  # the weights as they were before they were rounded
        (3, "float32", "another"),  # put together from the processes' parts
    ],
)
def test_a_released_module_is_plain(
    tmp_path: Path, stage: int, precision: str, frozen: str
) -> None:
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(stage), precision]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == frozen


def parameter_with(gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    parameter.grad = torch.tensor([3.0, 4.0]) * gradient
    return parameter


def test_gradients_are_clipped_stepped_and_dropped() -> None:
    parameter = parameter_with(1.0)
    # Norm 5, clipped to 1: 0.6 and 0.8.
    norm = clip_and_step([parameter], torch.optim.SGD([parameter], lr=0.5), 1.0)
    assert norm == 5.0
    assert parameter.tolist() == pytest.approx([0.7, 0.6])
    assert parameter.grad is None


def test_no_step_with_a_norm_that_is_none() -> None:
    parameter = parameter_with(math.nan)
    assert math.isnan(clip_and_step([parameter], torch.optim.SGD([parameter], lr=0.5), 1.0))
    assert parameter.tolist() == [1.0, 1.0]
    assert parameter.grad is None
