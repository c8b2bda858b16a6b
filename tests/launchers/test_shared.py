"""What points share, points with one key, and mistakes of points; no process is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import JobsFailed, UserError
from rlhf_exp.launchers import local
from rlhf_exp.launchers.points import JobResult, SweepPoint
from rlhf_exp.store.run_records import Records, Status
from tests.lab import jsonl, pairs, small_config

KILLED = JobResult(error="killed by SIGKILL", seconds=1.0, killed=True)
MADE = JobResult(0.5, seconds=1.0)


Behaviour = Callable[[SweepPoint, int], JobResult]
"""How a process ends that runs a point, and is the n-th to be started."""


class Process:
    """Stands in for the process of a point: it ends at once."""

    def __init__(self, point: SweepPoint, result: JobResult, gpus: list[str]) -> None:
        self.point, self.result, self.gpus = point, result, gpus

    def poll(self) -> JobResult:
        return self.result


class Machine:
    """Starts such processes in place of `PointProcess`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.started: list[str] = []
        monkeypatch.setattr(local, "PointProcess", self._start)

    def _start(
        self, point: SweepPoint, folder: Path, recorded: bool, threads: int, gpus: list[str]
    ) -> Process:
        self.started.append(point.steps[-1].stage)
        return Process(point, self.behaviour(point, len(self.started)), gpus)


def jobs(folder: Path, *points: str) -> list[tuple[list[str], Config]]:
    return [
        ([point], small_config(folder, "name=a", "stage=ppo", *point.split())) for point in points
    ]


def test_shared_work_that_is_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(point: SweepPoint, starts: int) -> JobResult:
        return KILLED if starts < 3 else MADE

    machine = Machine(monkeypatch, behaviour)
    ended = local.launch(4, jobs(tmp_path, "ppo.seed=0", "ppo.seed=1"))
    assert machine.started == ["reward", "reward", "reward", "ppo", "ppo"]
    assert ended == [0.5, 0.5]


def test_shared_work_that_is_killed_each_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda point, starts: KILLED)
    with pytest.raises(JobsFailed, match="2 of 2 points failed") as raised:
        local.launch(4, jobs(tmp_path, "ppo.seed=0", "ppo.seed=1"))
    assert machine.started == ["reward", "reward", "reward"]
    message = "ppo.seed=1: what it shares with other points failed: killed by SIGKILL"
    assert message in str(raised.value)


def test_the_record_of_a_killed_point_has_its_error_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(point: SweepPoint, starts: int) -> JobResult:
        doomed = point.config.ppo.seed == 1
        return replace(KILLED, log=tmp_path / "1.log") if doomed else MADE

    Machine(monkeypatch, behaviour)
    with pytest.raises(JobsFailed, match="1 of 2 points failed"):
        local.launch(4, jobs(tmp_path, "ppo.seed=0", "ppo.seed=1"))
    (record,) = Records(tmp_path / "sweeps").sweep("a")
    assert (record.status, record.overrides) == (Status.failed, ("ppo.seed=1",))
    assert (record.error, record.log) == ("killed by SIGKILL", str(tmp_path / "1.log"))


def test_shared_work_with_an_error_is_not_tried_again_and_spares_those_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(point: SweepPoint, starts: int) -> JobResult:
        wrong = point.steps[-1].stage == "reward" and point.config.reward.lr == 1.0
        return JobResult(error="the loss is nan", seconds=1.0) if wrong else MADE

    machine = Machine(monkeypatch, behaviour)
    rates = [f"reward.lr={lr} ppo.seed={seed}" for lr in (1.0, 0.001) for seed in (0, 1)]
    with pytest.raises(JobsFailed, match="2 of 4 points failed"):
        local.launch(4, jobs(tmp_path, *rates))
    assert sorted(machine.started) == ["ppo", "ppo", "reward", "reward", "sft"]


def test_points_with_one_key_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("ppo.lr=1e-3", "ppo.lr=0.001", "ppo.lr=2e-3")
    values = {0.001: 0.25, 0.002: 0.75}
    machine = Machine(
        monkeypatch, lambda point, starts: JobResult(values[point.config.ppo.lr], seconds=1.0)
    )
    ended = local.launch(4, jobs(tmp_path, *same))
    assert machine.started == ["reward", "ppo", "ppo"]
    assert ended == [0.25, 0.25, 0.75]
    assert "1 points have the key of an earlier one: run once" in capsys.readouterr().err


def test_mistakes_of_all_points_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = jsonl(tmp_path / "good.jsonl", pairs(60))
    machine = Machine(monkeypatch, lambda point, starts: MADE)
    own = f"data=hh_local data.preferences={good} ppo.use=nowhere"
    points = [own, "ppo.use=lost", "ppo.seed=0"]
    with pytest.raises(UserError) as raised:
        local.launch(4, jobs(tmp_path, *points))
    first, second, third = str(raised.value).splitlines()
    assert first == "2 problems in the config:"
    assert "nowhere" in second
    assert second.endswith(f"(1 of 3 points: all with {own})")
    assert "lost" in third
    assert third.endswith("(1 of 3 points: all with ppo.use=lost)")
    assert machine.started == []
