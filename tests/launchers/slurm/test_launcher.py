from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.errors import UserError
from rlhf_exp.launchers.slurm.launcher import copy_code, copy_user_functions, launch
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.store.artifact import git_state
from rlhf_exp.store.run_records import Records
from tests.lab import ROOT, small_config


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


def test_the_copy_runs_by_itself(tmp_path: Path) -> None:
    copy_code(tmp_path / "code")
    command = [sys.executable, str(tmp_path / "code" / "launch.py"), "--help", "ppo"]
    help_text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "ppo.lr" in help_text.stdout
    program = "import rlhf_exp, rlhf_exp.config.schema_keys as g; print(rlhf_exp.__path__, g.CONF)"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program],
        # The folder that a job starts in must not come first.
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path / "code")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.count(str(tmp_path / "code")) == 2


def test_the_copy_knows_the_state_of_git(tmp_path: Path) -> None:
    copy_code(tmp_path / "code")
    assert git_state(tmp_path / "code") == git_state(ROOT)


def test_the_users_own_reward_is_copied_and_the_key_stays(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    reward = f"ppo.reward.function={file}:score"
    config = small_config(tmp_path / "outputs", "stage=ppo", reward)
    copied = copy_user_functions(config, tmp_path / "code")
    keys = [step.key for step in plan(config)]
    content = file.read_text()
    file.write_text(content.replace("1.0", "2.0"))
    path, _, name = str(copied.ppo.reward.function).rpartition(":")
    assert (Path(path).read_text(), name) == (content, "score")
    assert [step.key for step in plan(copied)] == keys
    assert plan(config)[-1].key != keys[-1], "its content counts"
    toxic = f"eval.toxicity.scorer={file}:score"
    quick = copy_user_functions(small_config(tmp_path / "outputs", toxic), tmp_path / "code")
    assert quick.eval.toxicity.scorer.startswith(str(tmp_path / "code"))
    plain = small_config(tmp_path / "outputs")
    assert copy_user_functions(plain, tmp_path / "code") == plain
