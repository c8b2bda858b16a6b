from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.store.run_records import Records, Status
from rlhf_exp.store.store import Store
from tests.lab import run, weights
from tests.launchers.slurm.cluster import Cluster, wait
from tests.launchers.slurm.lab import Launch, checkpoints, paced, states

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_job_that_meets_its_time_limit_and_one_with_priority_ends_as_if_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notices are Slurm's own: of the time limit, and of the partition's preemption."""
    overrides, outputs = paced(tmp_path), tmp_path / "outputs"
    run(tmp_path / "alone", *overrides, "tracking=disabled")
    expected = Records(tmp_path / "alone" / "sweeps").resolve("latest").key

    # Slurm gives notice of a time limit up to a minute earlier than asked for: after 30 s to 90 s.
    monkeypatch.setenv("SCORER_PAUSE", "16")
    site = ["partition=main", "time_min=2", "signal_delay_s=30", "grace_s=8"]
    launched = Launch(
        cluster, outputs, "name=limited", *(f"hydra.launcher.{one}" for one in site), *overrides
    )

    def started(restarts: int) -> bool:
        """Whether the job trains at its n-th start, or a later one."""
        assert launched.process.poll() is None, launched.end()[1]
        jobs = launched.jobs("limited")
        queued = states(cluster).get(jobs[0][1].id) if jobs else None
        return queued is not None and queued.state == "RUNNING" and queued.restarts >= restarts

    wait(lambda: started(0) and checkpoints(outputs, "ppo", expected), 120)
    ((where, job),) = launched.jobs("limited")
    log = where.log(job)
    wait(lambda: started(1), 150, log.read_text)
    noticed = log.read_text().count("gives notice")
    assert noticed >= 1

    wanted = ("--partition=urgent", "--nodes=2", f"--cpus-per-task={cluster.cpus}")
    command = ["sbatch", "--parsable", *wanted, "--output=/dev/null", "--wrap=sleep 3"]
    urgent = cluster.output(*command).strip()
    wait(lambda: states(cluster)[urgent].state == "COMPLETED", 60, log.read_text)
    assert log.read_text().count("gives notice") > noticed

    code, printed = launched.end(400)
    assert code == 0, printed
    assert states(cluster)[job.id].restarts >= 2
    (there,) = Records(outputs / "sweeps").sweep("limited")
    assert (there.status, there.key) == (Status.done, expected)
    one = Store(tmp_path / "alone" / "store").lookup("ppo", expected)
    two = Store(outputs / "store").lookup("ppo", expected)
    assert one is not None
    assert two is not None
    assert weights(two) == weights(one)
