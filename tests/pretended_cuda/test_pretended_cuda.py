"""On a pretended CUDA: no operation mixes devices, and the host waits and launches little.

Ceilings are what was measured; docs/background/benchmarks.md has the figures. A change that lifts
one has made the GPU wait, or launch more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.rollout.sampler import ACCELERATOR_STRIDE
from tests.lab import ROOT
from tests.pretended_cuda.guard import LIBRARY, GuardUnavailable, compile_guard

KERNELS_OF_A_DECODE_STEP = {"gpt_neox": 108, "gptj": 134, "llama": 161}
"""Of models of two blocks in bfloat16, the host's copy of the tokens included."""

LAUNCHES_OF_A_STRIDE = 2 * ACCELERATOR_STRIDE + 2
"""Of each step a graph and a copy of its tokens; these are put together and copied to the host."""

KERNELS_OF_A_MICRO_BATCH = {"top": 371, "all": 484}
"""Forward and backward of a GPT-NeoX of two blocks of which one trains, or both."""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return compile_guard(tmp_path_factory.mktemp("guard"))
    except GuardUnavailable as missing:
        pytest.skip(str(missing))


def run_programs(guard: Path, folder: Path, *names: str) -> dict[str, Any]:
    environment = os.environ | {LIBRARY: str(guard), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretended_cuda.programs", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the quick programs return, all in one process: torch is pretended to as a whole."""
    names = ("refusals", "counting", "head_gradients", "decode", "update")
    return run_programs(guard, tmp_path_factory.mktemp("pretended"), *names)


def test_operations_that_mix_devices_fail(found: dict[str, Any]) -> None:
    errors = found["refusals"]
    assert "CPU tensors" in errors["cpu and gpu"]
    assert "different GPUs" in errors["two gpus"]
    assert "a CPU tensor with an index on a GPU" in errors["gpu index of a cpu tensor"]
    assert "numpy" in errors["numpy"]


@pytest.mark.parametrize(
    ("operation", "kernels", "syncs", "uploads"),
    [
        ("add", 1, 0, 0),
        ("view", 0, 0, 0),
        ("item", 1, 1, 0),
        ("tolist", 0, 1, 0),
        ("upload", 1, 1, 1),
        ("pinned upload", 1, 0, 1),
        ("boolean index", 2, 1, 0),
        ("index on the cpu", 1, 1, 1),
        ("nonzero", 1, 1, 0),
    ],
)
def test_what_is_counted(
    found: dict[str, Any], operation: str, kernels: int, syncs: int, uploads: int
) -> None:
    expected = {"kernels": kernels, "launches": kernels, "syncs": syncs, "uploads": uploads}
    assert found["counting"][operation] == expected


@pytest.mark.parametrize("family", KERNELS_OF_A_DECODE_STEP)
def test_a_stride_of_decoding_waits_once_and_uploads_nothing(
    found: dict[str, Any], family: str
) -> None:
    """The one wait is the look at the tokens of the stride before; a step is one graph."""
    stride = found["decode"][family]
    assert stride["syncs"] == 1
    assert stride["uploads"] == 0
    assert stride["launches"] <= LAUNCHES_OF_A_STRIDE
    assert stride["kernels"] <= KERNELS_OF_A_DECODE_STEP[family] * ACCELERATOR_STRIDE


@pytest.mark.parametrize("trained", KERNELS_OF_A_MICRO_BATCH)
def test_a_micro_batch_waits_at_most_once(found: dict[str, Any], trained: str) -> None:
    taken = found["update"][trained]["micro_batch"]
    assert taken["syncs"] <= 1
    assert taken["uploads"] <= 1  # the positions of its response tokens
    assert taken["kernels"] <= KERNELS_OF_A_MICRO_BATCH[trained]


def test_an_optimizer_step_over_a_frozen_trunk_waits_for_its_gradient_norm_alone(
    found: dict[str, Any],
) -> None:
    assert found["update"]["top"]["step"]["syncs"] == 1


@pytest.mark.parametrize(("trained", "waits"), [("top", 29), ("all", 39)])
def test_an_iteration_waits_seldom(found: dict[str, Any], trained: str, waits: int) -> None:
    """It samples, scores, compares and takes two optimizer steps; 198 and 179 waits it once was."""
    assert found["update"][trained]["iteration"]["syncs"] <= waits


def test_gradients_of_chunks_are_added_up_as_on_a_cpu(found: dict[str, Any]) -> None:
    """Three chunks of five rows; the GPU's own path adds products to the sum."""
    assert found["head_gradients"]["torch.float32"] < 1e-6
    assert found["head_gradients"]["torch.bfloat16"] < 0.02  # of values about 1: two roundings


@pytest.mark.slow
def test_all_stages_run_without_mixing_devices(guard: Path, tmp_path: Path) -> None:
    found = run_programs(guard, tmp_path, "smoke")["smoke"]
    for stage, metrics in found.items():
        count = metrics.pop("metrics")
        assert len(metrics) == count > 0, f"{stage}: a metric is not finite"
