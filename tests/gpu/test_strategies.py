"""Each strategy with one process over NCCL, and mixed precision, as a user starts them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import LAUNCH, ROOT, artifact, small

pytestmark = pytest.mark.gpu


def run(folder: Path, *overrides: str) -> None:
    """Run `launch.py` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(LAUNCH), *small(folder, "eval=none", *overrides)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def losses(folder: Path, stage: str) -> list[float]:
    """Return the losses that a stage has logged."""
    lines = (artifact(folder, stage).path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and reward model by one process, in float32."""
    folder = tmp_path_factory.mktemp("models") / "outputs"
    run(folder, "stage=ppo")
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero2_bf16", "zero3"])
def test_a_strategy_with_one_process_trains_as_none_does(
    name: str, models: Path, tmp_path: Path
) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path / "outputs"
    run(folder, "stage=sft", f"distributed={name}", "distributed.processes=1")
    expected, found = losses(models, "sft"), losses(folder, "sft")
    assert len(found) == len(expected) == 6
    # In bfloat16, eight bits of a weight: as docs/how-to/distributed.md has it.
    tolerance = 0.02 if name.endswith("bf16") else 1e-3
    assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_ppo_with_a_strategy(name: str, models: Path) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    # Another number of steps: a key of its own, over the same models.
    steps = {"ddp": 8, "fsdp": 10, "zero2": 12, "zero3": 14}[name]
    overrides = ("stage=ppo", f"distributed={name}", "distributed.processes=1")
    run(models, *overrides, f"ppo.steps={steps}")


def test_bfloat16_learns_as_float32_does(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    run(folder, "distributed.precision=bfloat16", "ppo.train_blocks=1", "reward.train_blocks=1")
    for stage in ("sft", "reward"):
        assert losses(folder, stage)[0] == pytest.approx(losses(models, stage)[0], abs=0.02)
    assert all(map(math.isfinite, losses(folder, "ppo")))
    rows = (artifact(folder, "ppo").path / "metrics.jsonl").read_text().splitlines()
    (first,) = [row for row in map(json.loads, rows) if "policy/ratio_first" in row][:1]
    assert first["policy/ratio_first"] == pytest.approx(1.0, abs=1e-3)
    assert first["memory/sampling_bytes"] > 0
