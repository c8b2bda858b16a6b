from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf_exp.multirun.endings import Ending
from rlhf_exp.multirun.points import Point
from rlhf_exp.multirun.process import PointProcess
from rlhf_exp.pipeline.plan import State, Step
from tests.lab import small_config


def started(folder: Path) -> PointProcess:
    """A point whose planning fails at once: no run is called `nowhere`."""
    config = small_config(folder, "name=a", "stage=ppo", "ppo.use=nowhere")
    point = Point(("ppo.use=nowhere",), config, (Step("ppo", "ab12", State.run),))
    return PointProcess(point, folder, recorded=True, threads=1)


def ended(process: PointProcess) -> Ending:
    deadline = time.monotonic() + 200
    while (ending := process.ending()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ending is not None
    return ending


def test_an_error_comes_back_and_the_code_is_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = tmp_path / "elsewhere" / "rlhf_exp"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemError('of the current folder')")
    monkeypatch.chdir(decoy.parent)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = ended(started(tmp_path))
    assert found.error is not None
    assert found.error.startswith("ppo.use=nowhere: no such folder, run or key")
    assert not found.killed
    assert "error: ppo.use=nowhere" in (tmp_path / "ab12.log").read_text()
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left beside the log"


def test_a_killed_process(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.kill()
    found = ended(process)
    assert found.killed
    assert found.error is not None
    assert found.error.splitlines()[-1] == "killed by SIGKILL"
