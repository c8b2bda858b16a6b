"""GPUs are divided among the points that run side by side; there need not be any to see it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from rlhf_exp.config.experiment import Config, DistributedConfig
from rlhf_exp.errors import JobsFailed
from rlhf_exp.launchers import local
from rlhf_exp.launchers.local import GpuPool, PointProcess
from rlhf_exp.launchers.points import JobResult, SweepPoint, differing_overrides, jobs_failed_error
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.store.lease import holders
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.sealed import file_digest
from rlhf_exp.store.store import Store
from tests.lab import LAUNCH, launch, small, small_config


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
        "hydra/launcher=parallel",
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
    command = [
        "-m",
        "name=cores",
        "stage=sft",
        "hydra/launcher=parallel",
        "hydra.launcher.n_jobs=2",
    ]
    command += ["sft.seed=0,1", "distributed.threads=null"]
    assert launch(tmp_path, *command) == 0
    made = [one.manifest.config for one in Store(tmp_path / "store").all()]
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [config["distributed"]["threads"] for config in made] == [half, half]


def point(key: str, *overrides: str) -> SweepPoint:
    return SweepPoint(overrides, Config(), (Step("ppo", key, StepState.run),))


def test_points_are_told_apart_by_what_differs() -> None:
    points = [point("a", "x=1", "ppo.lr=1", "s=0"), point("b", "x=1", "ppo.lr=2", "s=0")]
    assert differing_overrides(points) == {"a": "ppo.lr=1", "b": "ppo.lr=2"}
    endings = {"a": JobResult(0.5, seconds=1.0), "b": JobResult(error="Traceback\nValueError: no")}
    failed = jobs_failed_error(points, endings)
    assert isinstance(failed, JobsFailed)
    assert "1 of 2 points failed" in str(failed)
    assert "ppo.lr=2: ValueError: no" in str(failed)
    assert jobs_failed_error(points, {"a": JobResult(0.5)}) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_jobs_two_killed_and_the_same_command_again(tmp_path: Path) -> None:
    arguments = [
        "-m",
        *small(tmp_path, "name=eight", "hydra/launcher=parallel", "hydra.launcher.n_jobs=8"),
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


SCORER = """
import os, pathlib, time
def score(prompts, responses):
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    with pathlib.Path(__file__).with_name(f"{gpus}.seen").open("a") as seen:
        seen.write(f"{os.getpid()} {time.monotonic()}\\n")
    return [len(set(text)) / 10 for text in responses]
"""


def swept(folder: Path, *overrides: str) -> int:
    scorer = folder / "scorer.py"
    scorer.write_text(SCORER)
    given = ["-m", "name=gpus", "stage=ppo", "hydra/launcher=parallel", "ppo.seed=0,1,2"]
    function = f"ppo.reward.function={scorer}:score"
    return launch(folder / "outputs", *given, function, *overrides)


def point_of(processes: int) -> SweepPoint:
    return SweepPoint((), Config(distributed=DistributedConfig(processes=processes)), ())


def test_a_point_has_devices_of_its_own_while_it_runs() -> None:
    found = GpuPool(["0", "1", "2"])
    assert found.take(2) == ["0", "1"]
    assert found.take(2) is None, "one is left"
    assert found.take(1) == ["2"]
    assert found.take(1) is None
    found.give_back(["2"])
    found.give_back(["0", "1"])
    assert found.take(3) == ["0", "1", "2"], "in the order in which they were given"


def test_without_devices_nothing_is_shared_out() -> None:
    found = GpuPool()
    assert [found.take(4), found.take(4)] == [[], []]
    assert found.problem([point_of(99)]) is None


def test_as_many_as_cores_and_devices_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 16)
    assert GpuPool().side_by_side(2) == 8
    assert GpuPool(["0", "1", "2", "3", "4"]).side_by_side(2) == 2
    assert GpuPool(["0"]).side_by_side(2) == 1
    assert GpuPool([str(number) for number in range(64)]).side_by_side(2) == 8


def test_points_side_by_side_see_one_device_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "visible_devices", lambda: ["4", "GPU-ab"])
    assert swept(tmp_path, "hydra.launcher.n_jobs=3") == 0
    printed = capfd.readouterr().err
    assert "2 GPUs are visible: at most 2 of the 3 points run at the same time" in printed
    assert "runs on GPU 4: ppo.seed=0" in printed
    files = {path.stem: path.read_text().split("\n")[:-1] for path in tmp_path.glob("*.seen")}
    assert sorted(files) == ["4", "GPU-ab"]
    processes = set()
    for lines in files.values():
        times: dict[str, list[float]] = {}
        for line in lines:
            process, at = line.split()
            times.setdefault(process, []).append(float(at))
        spans = sorted((min(at), max(at)) for at in times.values())
        assert all(a[1] < b[0] for a, b in pairwise(spans)), "one at a time"
        processes |= times.keys()
    assert len(processes) == 3


def test_without_gpus_the_variable_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "visible_devices", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert swept(tmp_path, "hydra.launcher.n_jobs=2", "ppo.steps=2") == 0
    assert [path.name for path in tmp_path.glob("*.seen")] == ["none.seen"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_one_at_a_time_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which is not to import torch to count what it need not divide."""
    monkeypatch.setattr(local, "visible_devices", lambda: 1 / 0)
    assert swept(tmp_path, "hydra.launcher.n_jobs=1", "stage=sft") == 0


def test_a_point_that_needs_more_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "visible_devices", lambda: ["0", "1"])
    more = ("distributed=ddp", "distributed.processes=3", "hydra.launcher.n_jobs=2")
    assert swept(tmp_path, *more) == 2
    printed = capfd.readouterr().err
    assert (
        "distributed.processes=3: a point needs a GPU for each of its processes, and 2 are "
        "visible (0, 1); set it to at most 2" in printed
    )


def started(folder: Path) -> PointProcess:
    """A point whose planning fails at once: no run is called `nowhere`."""
    config = small_config(folder, "name=a", "stage=ppo", "ppo.use=nowhere")
    point = SweepPoint(("ppo.use=nowhere",), config, (Step("ppo", "ab12", StepState.run),))
    return PointProcess(point, folder, recorded=True, threads=1)


def ended(process: PointProcess) -> JobResult:
    deadline = time.monotonic() + 200
    while (ending := process.poll()) is None and time.monotonic() < deadline:
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
