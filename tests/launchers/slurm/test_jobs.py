from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_exp.launchers.slurm.launcher import copy_code
from rlhf_exp.store.run_records import Records, Status
from tests.lab import ROOT, artifact, weights
from tests.launchers.slurm.cluster import Cluster, wait
from tests.launchers.slurm.lab import Launch

pytestmark = pytest.mark.slurm


@pytest.mark.timeout(600)
def test_a_job_computes_what_a_run_here_computes_whatever_is_edited_meanwhile(
    cluster: Cluster, small_run: Path, tmp_path: Path
) -> None:
    checkout, outputs = tmp_path / "checkout", tmp_path / "outputs"
    copy_code(checkout)
    shutil.copytree(ROOT / "hydra_plugins", checkout / "hydra_plugins")
    later = "+hydra.launcher.sbatch.begin=now+5"
    launched = Launch(cluster, outputs, "name=one", later, program=checkout / "launch.py")
    wait(lambda: launched.jobs("one"), 120)
    (checkout / "rlhf_exp" / "experiment.py").write_text("raise RuntimeError('edited')\n")
    (checkout / "rlhf_exp" / "stages" / "sft.py").write_text("raise RuntimeError('edited')\n")
    (checkout / "conf" / "sft" / "default.yaml").write_text("lr: 0.5\n")

    code, printed = launched.end(400)
    assert code == 0, printed
    (record,) = Records(outputs / "sweeps").sweep("one")
    assert record.status is Status.done
    for stage in ("sft", "reward", "ppo"):
        here, there = artifact(small_run, stage), artifact(outputs, stage)
        assert (there.key, weights(there)) == (here.key, weights(here))
        assert there.manifest.git == here.manifest.git
