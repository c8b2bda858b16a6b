from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.store.run_records import Records, Status
from rlhf_exp.store.store import Store
from tests.lab import LAUNCH, small, weights
from tests.launchers.slurm.cluster import Cluster, wait
from tests.launchers.slurm.lab import Launch, checkpoints, give_notice, paced, states

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_four_workers_on_two_nodes_survive_all_that_can_happen(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*paced(tmp_path), "distributed=ddp", "distributed.processes=4"]
    alone = [sys.executable, str(LAUNCH), *small(tmp_path / "alone", *overrides, "name=alone")]
    subprocess.run(alone, check=True, timeout=600, capture_output=True)
    (record,) = Records(tmp_path / "alone" / "sweeps").sweep("alone")

    monkeypatch.setenv("SCORER_PAUSE", "2")
    outputs = tmp_path / "outputs"
    site = "hydra.launcher.processes_per_node=2"
    launched = Launch(cluster, outputs, "name=four", site, *overrides)

    def running(restarts: int, saved: int) -> bool:
        """Whether the job trains at its n-th start, and has saved that many steps."""
        assert launched.process.poll() is None, launched.end()[1]
        found = checkpoints(outputs, "ppo", record.key)
        steps = max(
            (int(path.name.partition("-")[2]) for path in found if path.is_dir()), default=0
        )
        jobs = launched.jobs("four")
        queued = states(cluster).get(jobs[0][1].id) if jobs else None
        return (
            queued is not None
            and (queued.state, queued.restarts) == ("RUNNING", restarts)
            and steps >= saved
        )

    wait(lambda: running(0, 2), 400)
    ((where, job),) = launched.jobs("four")
    assert states(cluster)[job.id].node == "node[1-2]"
    give_notice(cluster, where, job)
    wait(lambda: running(1, 6), 400, lambda: where.log(job).read_text())
    cluster.kill_node("node2")
    wait(lambda: states(cluster)[job.id].state != "RUNNING", 60)
    cluster.start_node("node2")
    wait(lambda: running(2, 8), 400, lambda: where.log(job).read_text())
    cluster.output("scontrol", "requeue", job.id)

    code, printed = launched.end(600)
    assert code == 0, printed
    assert states(cluster)[job.id].restarts == 3
    (there,) = Records(outputs / "sweeps").sweep("four")
    assert (there.status, there.key) == (Status.done, record.key)
    for stage, key in record.keys.items():
        one = Store(tmp_path / "alone" / "store").lookup(stage, key)
        two = Store(outputs / "store").lookup(stage, key)
        assert one is not None
        assert two is not None
        assert weights(two) == weights(one)
        assert two.manifest.wandb_run_id == first_run(two.path)


def first_run(artifact: Path) -> str | None:
    """Return the W&B run that its first start began, by the folders that W&B left."""
    runs = sorted((artifact / "wandb").glob("**/offline-run-*"))
    names = {path.name.rpartition("-")[2] for path in runs if path.is_dir()}
    assert len(names) == 1, runs
    return names.pop()
