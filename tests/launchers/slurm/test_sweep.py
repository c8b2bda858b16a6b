from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.store.run_records import Records, Status
from rlhf_exp.store.store import Store
from tests.lab import run, weights
from tests.launchers.slurm.cluster import Cluster, wait
from tests.launchers.slurm.lab import Launch, checkpoints, give_notice, paced, states

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

RATES = ("1e-3", "2e-3", "3e-3", "4e-3", "5e-3")
DIVERGES = "1e30"


def test_a_sweep_with_every_kind_of_disturbance_computes_what_it_computes_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, outputs = paced(tmp_path), tmp_path / "outputs"
    expected = []
    for rate in RATES[:3]:
        run(tmp_path / "alone", *overrides, f"ppo.lr={rate}", "tracking=disabled")
        records = Records(tmp_path / "alone" / "sweeps")
        expected.append(records.resolve("latest").key)

    monkeypatch.setenv("SCORER_PAUSE", "1.5")
    launched = Launch(
        cluster,
        outputs,
        *("-m", "name=six", f"ppo.lr={','.join((*RATES, DIVERGES))}"),
        "hydra.launcher.concurrent_jobs=3",
        "hydra.launcher.cpus_per_process=2",
        *overrides,
    )
    jobs: list[str] = []

    def started() -> bool:
        found = {job.key: job.id for _, job in launched.jobs("six") if not job.shared}
        jobs[:] = [found[key] for key in expected if key in found]
        saved = [checkpoints(outputs, "ppo", key) for key in expected]
        assert launched.process.poll() is None, launched.end()[1]
        return all(saved)

    wait(started, 200)
    before = states(cluster)
    nodes = {before[job].node for job in jobs}
    assert nodes == {"node1", "node2"}, "two jobs fill a node"
    assert sum(one.state == "RUNNING" for one in before.values()) == 3, "no more at a time"
    cluster.kill_node("node2")
    on_first = [job for job in jobs if before[job].node == "node1"]
    (noticed,) = (pair for pair in launched.jobs("six") if pair[1].id == on_first[0])
    give_notice(cluster, *noticed)
    cluster.output("scontrol", "requeue", on_first[1])

    code, printed = launched.end(400)
    cluster.start_node("node2")
    assert code == 1
    assert "1 of 7 jobs failed" in printed, printed
    after = states(cluster)
    assert [after[job].restarts >= 1 for job in jobs] == [True, True, True], after

    found = {record.key: record for record in Records(outputs / "sweeps").sweep("six")}
    assert sorted(one.status for one in found.values()) == [Status.done] * 5 + [Status.failed]
    (failed,) = (one for one in found.values() if one.status is Status.failed)
    assert "training stopped" in str(failed.error)
    here, there = Store(tmp_path / "alone" / "store"), Store(outputs / "store")
    for key in expected:
        alone, disturbed = here.lookup("ppo", key), there.lookup("ppo", key)
        assert alone is not None
        assert disturbed is not None
        assert weights(disturbed) == weights(alone)
