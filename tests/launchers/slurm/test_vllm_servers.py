"""`examples/vllm.sbatch`: one node trains, another samples by vLLM (markers `slurm` and `vllm`)."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from tests.lab import ROOT, artifact, small
from tests.launchers.slurm.cluster import Cluster, wait

pytestmark = [pytest.mark.slurm, pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_job_trains_on_one_node_and_samples_on_another(cluster: Cluster, tmp_path: Path) -> None:
    python = os.environ.get("RLHF_EXP_VLLM_PYTHON")
    if not python:
        pytest.skip("RLHF_EXP_VLLM_PYTHON names no interpreter with vLLM")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path / "job.log"
    overrides = ("model.architecture.width=64", "ppo.seq_length=128", "stage=ppo")
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GPUS": "1",  # servers on a node; these have no GPU
        "VLLM_PORT": str(port),
        "VLLM_LOGS": str(tmp_path),
        "RLHF_EXP_VLLM_PYTHON": python,
    }
    cluster.output(
        "sbatch",
        "--nodes=2",
        "--gpus-per-node=0",
        f"--output={log}",
        f"--chdir={ROOT}",
        f"--export=ALL,{','.join(f'{name}={value}' for name, value in variables.items())}",
        str(ROOT / "examples" / "vllm.sbatch"),
        *small(tmp_path / "outputs", *overrides),
    )
    wait(lambda: not cluster.output("squeue", "--noheader"), 400, log.read_text)
    assert artifact(tmp_path / "outputs", "ppo").path.is_dir(), log.read_text()
    (server,) = tmp_path.glob("vllm-*-node2-0.log")
    assert f"vLLM on http://0.0.0.0:{port}" in server.read_text()
