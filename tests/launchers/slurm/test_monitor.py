from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlhf_exp.cli import main
from tests.launchers.slurm.cluster import Cluster, wait
from tests.launchers.slurm.lab import Launch, states

pytestmark = pytest.mark.slurm

HELD = "+hydra.launcher.sbatch.hold=true"


def rlhf_exp(outputs: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["--outputs", str(outputs), *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_jobs_outlive_the_launcher_are_joined_again_and_cancelled(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs"
    overrides = ["-m", "name=held", "ppo.seed=0,1", "stage=ppo", HELD]
    launched = Launch(cluster, outputs, *overrides)

    def held() -> dict[str, str]:
        jobs = {job.id for _, job in launched.jobs("held")}
        return {number: one.state for number, one in states(cluster).items() if number in jobs}

    wait(lambda: len(held()) == 3, 100)
    launched.process.send_signal(signal.SIGINT)
    code, printed = launched.end()
    assert code == 130
    assert "3 jobs stay in Slurm's queue" in printed
    assert "rlhf-exp cancel held" in printed

    waiting = held()
    assert set(waiting.values()) == {"PENDING"}
    shown = rlhf_exp(outputs, "status", "held", capsys=capsys)
    assert shown.count("waiting") == 3
    assert "shared by the points: JobHeldUser" in shown
    (shared,) = (job.id for _, job in launched.jobs("held") if job.shared)
    waits = cluster.output("squeue", "--noheader", "--array", "-ODependency:80").split()
    assert [text.startswith(f"afterok:{shared}") for text in waits if text != "(null)"] == [
        True
    ] * 2

    again = Launch(cluster, outputs, *overrides)
    joined: list[str] = []
    assert again.process.stdout is not None
    for line in again.process.stdout:
        joined.append(line)
        if "in the queue" in line:
            break
    again.process.send_signal(signal.SIGINT)
    assert again.end()[0] == 130
    assert "held: 2 points; 3 jobs in the queue" in joined[-1]
    assert held() == waiting

    shown = rlhf_exp(outputs, "cancel", "held", capsys=capsys)
    assert "cancelled 3 jobs" in shown
    assert set(held().values()) == {"CANCELLED"}
    shown = rlhf_exp(outputs, "status", "held", capsys=capsys)
    assert shown.count("cancelled") == 3
    assert "no job is in the queue" in rlhf_exp(outputs, "cancel", "held", capsys=capsys)
