"""A study whose workers are Slurm jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launchers.optuna.lab import states
from tests.launchers.slurm.cluster import Cluster
from tests.launchers.slurm.lab import Launch

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_two_jobs_share_a_study(cluster: Cluster, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    launched = Launch(
        cluster,
        outputs,
        *("-m", "sweep=ppo_optuna", "name=tpe", "stage=ppo"),
        *("study.trials=4", "study.workers=2", "study.pruner=none"),
        "hydra.launcher.cpus_per_process=1",
    )
    code, printed = launched.end(400)
    assert code == 0, printed
    assert states(outputs) == ["COMPLETE"] * 4
    jobs = {job.key for _, job in launched.jobs("tpe") if not job.shared}
    assert jobs == {"worker-0", "worker-1"}
    shared = [job.stage for _, job in launched.jobs("tpe") if job.shared]
    assert shared == ["reward"], "made before the workers start"
