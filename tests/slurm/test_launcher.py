from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.config.slurm import SlurmConfig
from rlhf_exp.errors import UserError
from rlhf_exp.slurm.launcher import launch
from rlhf_exp.store.records import Records
from tests.lab import small_config


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be an sbatch, which nothing may call."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


def test_what_is_done_needs_no_job(run_copy: Path) -> None:
    (record,) = Records(run_copy / "sweeps").sweep("small")
    config = small_config(run_copy, "name=small")
    assert launch(SlurmConfig(), [(["name=small"], config)]) == [record.objective]
    assert not (run_copy / "sweeps" / "small" / "slurm").exists()


def test_a_model_that_is_not_in_the_cache_is_missed_at_submission(tmp_path: Path) -> None:
    overrides = ["name=far", "model.path=org/absent", "reward.use=org/judge"]
    config = small_config(tmp_path / "outputs", *overrides)
    with pytest.raises(UserError) as raised:
        launch(SlurmConfig(), [(overrides, config)])
    message = str(raised.value)
    assert "\n  model org/absent (model.path)\n  model org/judge (reward.use)\n" in message
    assert message.endswith("rlhf-exp fetch name=far model.path=org/absent reward.use=org/judge")
    assert not (tmp_path / "outputs" / "sweeps").exists()
