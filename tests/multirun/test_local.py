from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf_exp.config.root import Config
from rlhf_exp.errors import JobsFailed
from rlhf_exp.multirun.endings import Ending, failure_of, varied
from rlhf_exp.multirun.points import Point
from rlhf_exp.pipeline.plan import State, Step
from rlhf_exp.store.fingerprint import file_digest
from rlhf_exp.store.holders import holders
from rlhf_exp.store.records import Records, RunRecord, Status
from rlhf_exp.store.store import Store
from tests.lab import LAUNCH, launch, small


def records(folder: Path, name: str) -> dict[str, RunRecord]:
    """Return the records of a multirun by the last of PPO's overrides: what the tests sweep."""
    found = Records(folder / "sweeps").sweep(name)
    return {[text for text in one.overrides if "ppo." in text][-1]: one for one in found}


def created(folder: Path) -> dict[str, str]:
    return {one.key: one.manifest.created for one in Store(folder / "store").all()}


def test_a_failed_point_does_not_end_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["-m", "name=two", "stage=ppo", "ppo.lr=1e30,1e-3"]
    assert launch(tmp_path, *command) == 1
    printed = capfd.readouterr().err
    assert "1 of 2 points failed; the same command runs what is missing" in printed
    assert "ppo.lr=1e+30: " in printed
    found = records(tmp_path, "two")
    assert found["ppo.lr=1e+30"].status is Status.failed
    assert "training stopped" in str(found["ppo.lr=1e+30"].error)
    assert found["ppo.lr=0.001"].status is Status.done

    before = created(tmp_path)
    assert launch(tmp_path, *command) == 1
    printed = capfd.readouterr().err
    assert "two: 2 points, 1 of them done" in printed
    assert created(tmp_path) == before


def test_points_side_by_side_survive_a_killed_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import os, signal, pathlib\n"
        "doomed = pathlib.Path(__file__).with_name('kill')\n"
        "def score(prompts, responses):\n"
        "    try:\n"
        "        doomed.unlink()\n"
        "    except FileNotFoundError:\n"
        "        return [len(set(text)) / 10 for text in responses]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [
        "-m",
        "name=three",
        "stage=ppo",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        f"ppo.reward.function={scorer}:score",
        "ppo.seed=0,1,2",
    ]
    (tmp_path / "kill").touch()
    outputs = tmp_path / "outputs"
    assert launch(outputs, *command) == 1
    printed = capfd.readouterr().err
    assert "1 of 3 points failed" in printed
    assert "killed by SIGKILL" in printed
    found = records(outputs, "three")
    states = sorted(one.status for one in found.values())
    assert states == [Status.done, Status.done, Status.failed]
    stages = [one.stage for one in Store(outputs / "store").all()]
    assert sorted(stages) == ["ppo", "ppo", "sft"]

    before = created(outputs)
    assert launch(outputs, *command) == 0
    assert "three: 3 points, 2 of them done" in capfd.readouterr().err
    assert {one.status for one in records(outputs, "three").values()} == {Status.done}
    after = created(outputs)
    assert before.items() <= after.items()
    assert len(after) == 4


def test_a_number_of_jobs_that_makes_no_sense(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "-m", "name=none", "hydra.launcher.n_jobs=0", "ppo.seed=0,1") == 2
    assert "hydra.launcher.n_jobs=0: must be at least 1, or -1" in capfd.readouterr().err


def test_cores_are_divided(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of two jobs gets half of the cores, and not less than one."""
    command = ["-m", "name=cores", "stage=sft", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command += ["sft.seed=0,1", "distributed.threads=null"]
    assert launch(tmp_path, *command) == 0
    made = [one.manifest.config for one in Store(tmp_path / "store").all()]
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [config["distributed"]["threads"] for config in made] == [half, half]


def point(key: str, *overrides: str) -> Point:
    return Point(overrides, Config(), (Step("ppo", key, State.run),))


def test_points_are_told_apart_by_what_differs() -> None:
    points = [point("a", "x=1", "ppo.lr=1", "s=0"), point("b", "x=1", "ppo.lr=2", "s=0")]
    assert varied(points) == {"a": "ppo.lr=1", "b": "ppo.lr=2"}
    endings = {"a": Ending(0.5, seconds=1.0), "b": Ending(error="Traceback\nValueError: no")}
    failed = failure_of(points, endings)
    assert isinstance(failed, JobsFailed)
    assert "1 of 2 points failed" in str(failed)
    assert "ppo.lr=2: ValueError: no" in str(failed)
    assert failure_of(points, {"a": Ending(0.5)}) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_jobs_two_killed_and_the_same_command_again(tmp_path: Path) -> None:
    arguments = [
        "-m",
        *small(tmp_path, "name=eight", "hydra/launcher=joblib", "hydra.launcher.n_jobs=8"),
        "ppo.seed=0,1,2,3,4,5,6,7",
        "ppo.steps=60",
    ]
    arguments = [text for text in arguments if text != "ppo.steps=6"]
    command = [sys.executable, str(LAUNCH), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    killed = 0
    while process.poll() is None and killed < 2:
        for child in psutil.Process(process.pid).children():
            folders = (tmp_path / "store" / ".staging").glob("ppo-*/checkpoints/step-*")
            if any(folders) and killed < 2 and child.is_running():
                child.send_signal(signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 1, printed
    assert "2 of 8 points failed" in printed
    before = created(tmp_path)
    again = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert "8 points, 6 of them done" in again.stderr
    after = created(tmp_path)
    assert before.items() <= after.items()
    store = Store(tmp_path / "store")
    stages = [one.stage for one in store.all()]
    assert {stage: stages.count(stage) for stage in ("sft", "reward", "ppo", "eval")} == {
        "sft": 1,
        "reward": 1,
        "ppo": 8,
        "eval": 8,
    }
    for one in store.all():
        for name, entry in one.manifest.files.items():
            assert file_digest(one.path / name) == entry.sha256


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_points_share_is_killed_while_four_sweeps_start(tmp_path: Path) -> None:
    """Four commands at the same moment; the one that trains SFT dies, another takes over."""
    commands = [
        [sys.executable, str(LAUNCH), *small(tmp_path, f"name=n{seed}", f"ppo.seed={seed}")]
        for seed in range(4)
    ]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    victim = None
    while victim is None:
        time.sleep(0.02)
        saved = any((tmp_path / "store" / ".staging").glob("sft-*/checkpoints/step-*"))
        held = [one for one in holders(tmp_path / "store") if one.stage == "sft"]
        victim = held[0].pid if saved and held else None
    os.kill(victim, signal.SIGKILL)
    codes = sorted(process.wait(600) for process in processes)
    assert codes == [-9, 0, 0, 0]
    stages = [one.stage for one in Store(tmp_path / "store").all()]
    assert (stages.count("sft"), stages.count("reward"), stages.count("ppo")) == (1, 1, 3)
