from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.store.records import Records, Status
from tests.lab import artifact, weights
from tests.slurm.cluster import Cluster
from tests.slurm.lab import Launch

pytestmark = pytest.mark.slurm


def test_one_job_computes_what_a_run_here_computes(
    cluster: Cluster, small_run: Path, tmp_path: Path
) -> None:
    code, printed = Launch(cluster, tmp_path / "outputs", "name=one").end()
    assert code == 0, printed
    (record,) = Records(tmp_path / "outputs" / "sweeps").sweep("one")
    assert record.status is Status.done
    for stage in ("sft", "reward", "ppo"):
        here, there = artifact(small_run, stage), artifact(tmp_path / "outputs", stage)
        assert (there.key, weights(there)) == (here.key, weights(here))
    assert there.manifest.git == here.manifest.git
