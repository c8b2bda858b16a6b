"""Two processes with half of the rows each compute what one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, processes: int) -> dict:
    folder.mkdir()
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.two_processes", str(folder)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what one process and two processes found."""
    return [launch(tmp_path_factory.mktemp("runs") / str(count), count) for count in (1, 2)]


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce_pp"])
def test_two_processes_equal_one(runs: list[dict], estimator: str) -> None:
    one, two = (found[estimator] for found in runs)
    assert len(one["rows"]) == len(two["rows"]) == 2
    own = {"gae": ["loss/value"], "rloo": ["reward/group_std"], "grpo": ["loss/kl"]}
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        compared = ["reward/mean", "reward/std", "kl/sequence", "loss/policy", "loss/total"]
        for name in compared + own.get(estimator, []):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
    for name, value in one["weights"].items():
        # A key's bias moves all of a query's scores alike, so its gradient is rounding alone, which
        # Adam blows up to full steps.
        if name.endswith("query_key_value.bias"):
            continue
        assert torch.allclose(value, two["weights"][name], atol=1e-4), name
