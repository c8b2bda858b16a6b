"""GPUs are divided among the points that run side by side; there need not be any to see it."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf_exp.config.root import Config
from rlhf_exp.config.running import DistributedConfig
from rlhf_exp.multirun import devices
from rlhf_exp.multirun.devices import Devices
from rlhf_exp.multirun.points import Point
from tests.lab import launch

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
    given = ["-m", "name=gpus", "stage=ppo", "hydra/launcher=joblib", "ppo.seed=0,1,2"]
    function = f"ppo.reward.function={scorer}:score"
    return launch(folder / "outputs", *given, function, *overrides)


def point(processes: int) -> Point:
    return Point((), Config(distributed=DistributedConfig(processes=processes)), ())


def test_a_point_has_devices_of_its_own_while_it_runs() -> None:
    found = Devices(["0", "1", "2"])
    assert found.take(2) == ["0", "1"]
    assert found.take(2) is None, "one is left"
    assert found.take(1) == ["2"]
    assert found.take(1) is None
    found.give_back(["2"])
    found.give_back(["0", "1"])
    assert found.take(3) == ["0", "1", "2"], "in the order in which they were given"


def test_without_devices_nothing_is_shared_out() -> None:
    found = Devices()
    assert [found.take(4), found.take(4)] == [[], []]
    assert found.problem([point(99)]) is None


def test_as_many_as_cores_and_devices_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 16)
    assert Devices().side_by_side(2) == 8
    assert Devices(["0", "1", "2", "3", "4"]).side_by_side(2) == 2
    assert Devices(["0"]).side_by_side(2) == 1
    assert Devices([str(number) for number in range(64)]).side_by_side(2) == 8


def test_points_side_by_side_see_one_device_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "visible_devices", lambda: ["4", "GPU-ab"])
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
    monkeypatch.setattr(devices, "visible_devices", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert swept(tmp_path, "hydra.launcher.n_jobs=2", "ppo.steps=2") == 0
    assert [path.name for path in tmp_path.glob("*.seen")] == ["none.seen"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_one_at_a_time_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which is not to import torch to count what it need not divide."""
    monkeypatch.setattr(devices, "visible_devices", lambda: 1 / 0)
    assert swept(tmp_path, "hydra.launcher.n_jobs=1", "stage=sft") == 0


def test_a_point_that_needs_more_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "visible_devices", lambda: ["0", "1"])
    more = ("distributed=ddp", "distributed.processes=3", "hydra.launcher.n_jobs=2")
    assert swept(tmp_path, *more) == 2
    printed = capfd.readouterr().err
    assert (
        "distributed.processes=3: a point needs a GPU for each of its processes, and 2 are "
        "visible (0, 1); set it to at most 2" in printed
    )
