from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rlhf_exp.pipeline.plan import plan
from rlhf_exp.slurm.snapshot import copy_code, with_own_code
from rlhf_exp.store.artifact import git_state
from tests.lab import ROOT, small_config


def test_the_copy_runs_by_itself(tmp_path: Path) -> None:
    copy_code(tmp_path / "code")
    command = [sys.executable, str(tmp_path / "code" / "launch.py"), "--help", "ppo"]
    help_text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "ppo.lr" in help_text.stdout
    program = "import rlhf_exp, rlhf_exp.config.groups as g; print(rlhf_exp.__path__, g.CONF)"
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
    copied = with_own_code(config, tmp_path / "code")
    keys = [step.key for step in plan(config)]
    content = file.read_text()
    file.write_text(content.replace("1.0", "2.0"))
    path, _, name = str(copied.ppo.reward.function).rpartition(":")
    assert (Path(path).read_text(), name) == (content, "score")
    assert [step.key for step in plan(copied)] == keys
    assert plan(config)[-1].key != keys[-1], "its content counts"
    toxic = f"eval.toxicity.scorer={file}:score"
    quick = with_own_code(small_config(tmp_path / "outputs", toxic), tmp_path / "code")
    assert quick.eval.toxicity.scorer.startswith(str(tmp_path / "code"))
    plain = small_config(tmp_path / "outputs")
    assert with_own_code(plain, tmp_path / "code") == plain
