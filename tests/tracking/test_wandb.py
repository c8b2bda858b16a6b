"""W&B offline: what is logged is in the file, whatever ends the process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import psutil
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.tracking import wandb_tracker
from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.local import read_metrics
from rlhf_exp.tracking.wandb_log import joined_history, read_wandb_file, wandb_files
from tests.tracking.service import kill_service

# Logs a row every 100 ms, says which, and goes on until it is killed. Faster, and W&B would fill a
# buffer of 32 KiB and flush it whatever the interval.
ENDLESS_RUN = """
import sys, time
from pathlib import Path
from rlhf_exp.tracking.tracker import finishing
from rlhf_exp.tracking.create import open_tracker
tracker = open_tracker("offline", Path(sys.argv[1]), config={"lr": 0.5}, resume_step=0)
with finishing(tracker):
    step = 0
    while True:
        step += 1
        tracker.log({"reward/mean": step / 2}, step)
        print(step, time.monotonic(), flush=True)
        time.sleep(0.1)
"""


class Endless:
    """A process that runs `ENDLESS_RUN`, and the rows it said it had logged."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", ENDLESS_RUN, str(folder)]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": root}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.rows: list[tuple[int, float]] = []

    def end(self, number: int, *, after_s: float) -> int:
        """Send a signal some time after the first row; return the exit code."""
        assert self.process.stdout is not None
        while not self.rows or self.rows[-1][1] < self.rows[0][1] + after_s:
            self._said(self.process.stdout.readline())
        if number == signal.SIGKILL:  # as a cluster does it: W&B's own process dies as well
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.send_signal(number)
        for line in self.process.stdout:
            if line.endswith("\n"):
                self._said(line)
        return self.process.wait(timeout=30)

    def _said(self, line: str) -> None:
        step, when = line.split()
        self.rows.append((int(step), float(when)))


def eventually(count: Callable[[], int], at_least: int) -> int:
    """W&B's own process writes on for a moment after ours is gone."""
    deadline = time.monotonic() + 5
    while count() < at_least and time.monotonic() < deadline:
        time.sleep(0.1)
    return count()


def test_a_killed_run_loses_no_local_row_and_at_most_three_seconds_at_wandb(tmp_path: Path) -> None:
    run = Endless(tmp_path)
    assert run.end(signal.SIGKILL, after_s=4.0) == -signal.SIGKILL
    last_step, last_time = run.rows[-1]
    local = [row["global_step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert local[:last_step] == list(range(1, last_step + 1))
    assert len(local) <= last_step + 1  # one may be logged and not yet said
    (path,) = wandb_files(tmp_path)
    old = sum(when <= last_time - 3.0 for _, when in run.rows)
    kept = eventually(lambda: len(read_wandb_file(path).history), old)
    assert kept >= old > 0
    survivor = read_wandb_file(path)
    assert survivor.exit_code is None
    assert survivor.config["lr"] == 0.5


def test_a_terminated_run_keeps_every_row_and_says_that_it_will_be_continued(
    tmp_path: Path,
) -> None:
    run = Endless(tmp_path)
    assert run.end(signal.SIGTERM, after_s=0.5) == 143
    (path,) = wandb_files(tmp_path)
    written = read_wandb_file(path)
    steps = [row["global_step"] for row in written.history]
    assert steps[: len(run.rows)] == [step for step, _ in run.rows]
    assert len(steps) <= len(run.rows) + 1
    assert written.exit_code == 143
    assert written.preempting


class Style(Enum):
    """An enum as the config has them."""

    HH = "hh"


def test_what_is_logged_reads_back(tmp_path: Path) -> None:
    tracker = open_tracker(
        "offline",
        tmp_path,
        project="project",
        group="kl",
        job_type="ppo",
        name="kl-3",
        tags=["a", "b"],
        config={"ppo": {"lr": 1e-6, "style": Style.HH}, "path": tmp_path},
    )
    tracker.log({"reward/mean": 0.5, "kl/k1": math.nan, "loss/total": math.inf}, 1)
    tracker.table("eval/samples", ["response", "score"], [["a\ud800<b>", 1.5], ["c", 2]], 1)
    tracker.summary({"reward": 2.5, "reason": "done"})
    tracker.finish()
    tracker.finish()
    (path,) = wandb_files(tmp_path)
    run = read_wandb_file(path)
    assert (run.run_id, run.project, run.group) == (tracker.run_id, "project", "kl")
    assert (run.job_type, run.name, run.tags) == ("ppo", "kl-3", ["a", "b"])
    assert run.config["ppo"] == {"lr": 1e-6, "style": "HH"}
    assert run.config["path"] == str(tmp_path)
    assert run.exit_code == 0
    assert not run.preempting
    assert (run.summary["reward"], run.summary["reason"]) == (2.5, "done")
    scalars, with_table = run.history
    assert (scalars["global_step"], scalars["reward/mean"]) == (1, 0.5)
    assert math.isnan(scalars["kl/k1"])
    assert scalars["ppo/loss/total"] == math.inf
    file = path.parent / "files" / with_table["ppo/eval/samples"]["path"]
    assert json.loads(file.read_text())["data"] == [["a\ud800<b>", 1.5], ["c", 2]]


def test_all_files_stay_in_the_folder_and_the_environment_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", "/nowhere")
    tracker = open_tracker("offline", tmp_path / "run")
    tracker.table("samples", ["x"], [[1]], 1)
    tracker.finish()
    assert os.environ["WANDB_DATA_DIR"] == "/nowhere"
    assert any((tmp_path / "run/wandb-data").rglob("*"))
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_an_agents_variables_name_no_run_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = {"SWEEP_ID": "theirs", "RUN_ID": "theirs12", "PROJECT": "theirs", "DIR": str(tmp_path)}
    agent |= {"RUN_GROUP": "theirs", "TAGS": "theirs", "MODE": "disabled"}
    for name, value in agent.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = open_tracker("offline", tmp_path / "run", project="ours")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    (log,) = (tmp_path / "run" / "wandb").rglob("*.wandb")
    run = read_wandb_file(log)
    assert (run.run_id, run.project, run.group, run.tags) == (tracker.run_id, "ours", "", [])
    assert "WANDB_RUN_ID" in caplog.text
    assert "not followed; the config says what is recorded" in caplog.text
    assert os.environ["WANDB_RUN_ID"] == "theirs12"


def test_a_finished_run_is_complete_on_disk_at_once(tmp_path: Path) -> None:
    for number in range(10):
        tracker = open_tracker("offline", tmp_path / str(number))
        tracker.log({"x": 1.0}, 1)
        tracker.finish(3)
        (path,) = wandb_files(tmp_path / str(number))
        assert read_wandb_file(path).exit_code == 3


def test_finishing_waits_until_the_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [False, False, True]
    monkeypatch.setattr(wandb_tracker, "is_complete", lambda path: answers.pop(0))
    open_tracker("offline", tmp_path).finish()
    assert answers == []


def test_a_resumed_run_has_one_row_per_step_and_the_same_id(tmp_path: Path) -> None:
    ids = []
    for resume_step, steps, value in ((None, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        tracker = open_tracker("offline", tmp_path, resume_step=resume_step)
        ids.append(tracker.run_id)
        for step in steps:
            tracker.log({"reward/mean": value}, step)
        tracker.finish()
    assert ids[0] == ids[1] != ""
    paths = wandb_files(tmp_path)
    assert [read_wandb_file(path).run_id for path in paths] == ids
    # 4 and 5 were logged before the kill and again after it: the later ones count.
    expected = [(step, 1.0 if step <= 3 else 2.0) for step in range(1, 8)]
    joined = [(row["global_step"], row["reward/mean"]) for row in joined_history(paths)]
    assert joined == expected
    local = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["global_step"], row["reward/mean"]) for row in local] == expected


def test_two_runs_of_one_process_are_two_even_if_one_is_left_open(tmp_path: Path) -> None:
    first = open_tracker("offline", tmp_path / "a")
    second = open_tracker("offline", tmp_path / "b")
    second.log({"x": 2.0}, 1)
    first.log({"x": 1.0}, 1)
    second.finish()
    first.finish()
    for folder, tracker, value in (("a", first, 1.0), ("b", second, 2.0)):
        (path,) = wandb_files(tmp_path / folder)
        run = read_wandb_file(path)
        assert run.run_id == tracker.run_id
        assert [row["x"] for row in run.history] == [value]


def test_online_without_a_key_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody is reached by this test
    with pytest.raises(UserError, match="tracking=offline"):
        open_tracker("online", tmp_path / "run")


def test_disabled_needs_no_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf_exp.tracking.create import open_tracker\n"
        "tracker = open_tracker('disabled', Path(sys.argv[1]), run_id='mine')\n"
        "tracker.log({'a': 1.0}, 1); tracker.finish(); print(tracker.run_id)\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\n"
    assert not (tmp_path / "wandb").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def values(folder: Path) -> list[tuple[int, float | None]]:
    """Return step and value of every row of all logs, in order, repetitions included."""
    rows = [row for path in wandb_files(folder) for row in read_wandb_file(path).history]
    return [(row["global_step"], row.get("loss/total")) for row in rows]


def test_a_killed_service_costs_no_row_and_no_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker("offline", tmp_path, config={"lr": 0.5})
    # At once: not even the config is on disk.
    kill_service()
    tracker.log({"loss/total": 1.0}, 1)
    tracker.log({"loss/total": 2.0}, 2)
    kill_service()
    tracker.histogram("reward/histogram", [1.0, 2.0], 3)
    tracker.log({"loss/total": 3.0}, 3, more=True)
    kill_service()
    tracker.log({"loss/total": 3.5}, 3)
    tracker.summary({"best": 3.5})
    tracker.finish(0)
    assert values(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert len(wandb_files(tmp_path)) == 4
    last = read_wandb_file(wandb_files(tmp_path)[-1])
    assert (last.exit_code, last.config["lr"], last.summary["best"]) == (0, 0.5, 3.5)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 3
    assert "was started again" in said[0]
    assert "metrics.jsonl has everything" in said[0]


def test_a_service_that_does_not_stay_is_given_up_and_the_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker("offline", tmp_path)
    tracker.log({"loss/total": 1.0}, 1)
    time.sleep(1.5)  # until the row is on disk
    monkeypatch.setattr(wandb_tracker, "RESTARTS", 0)
    kill_service()
    for step in (2, 3):
        tracker.log({"loss/total": float(step)}, step)
    tracker.alert("a", "b", 3)
    tracker.mark_preempting()
    tracker.finish(0)
    assert [row["global_step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert values(tmp_path) == [(1, 1.0)]
    warned = [r.getMessage() for r in caplog.records if "own process" in r.getMessage()]
    assert len(warned) == 1
    assert "are sent from there by `rlhf-exp sync`, or recorded again" in warned[0]
    # The next stage of this process has another service, and what was lost is recorded again.
    tracker = open_tracker("offline", tmp_path, resume_step=2)
    tracker.log({"loss/total": 3.25}, 3)
    tracker.finish(0)
    assert values(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.25)]


def test_a_service_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(**_: object) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb_tracker.wandb, "init", killed)
    with pytest.raises(UserError, match=r"^tracking=offline: W&B's own process") as caught:
        open_tracker("offline", tmp_path)
    assert "The same command tries again" in str(caught.value)
    assert "wandb login" not in str(caught.value)


def test_a_resumed_run_records_again_what_a_kill_lost(tmp_path: Path) -> None:
    tracker = open_tracker("offline", tmp_path)
    for step in (1, 2, 3):
        tracker.log({"loss/total": step / 2}, step)
    tracker.finish(143)
    (log,) = wandb_files(tmp_path)
    local = tmp_path / "metrics.jsonl"
    # Rows 4 and 5 were logged, and the kill came before W&B had flushed them.
    with local.open("a") as file:
        for step in (4, 5):
            file.write(json.dumps({"global_step": step, "loss/total": step / 2}) + "\n")
    tracker = open_tracker("offline", tmp_path, resume_step=4)
    tracker.log({"loss/total": 7.0}, 5)
    tracker.finish(0)
    assert [step for step, _ in values(tmp_path)] == [1, 2, 3, 4, 5]
    assert joined_history(wandb_files(tmp_path))[-1]["loss/total"] == 7.0
    (again,) = set(wandb_files(tmp_path)) - {log}
    assert [row["global_step"] for row in read_wandb_file(again).history] == [4, 5]


def test_starts_are_ordered_by_their_number_whatever_the_clock_said(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        tracker = open_tracker("offline", tmp_path, resume_step=step - 1 or None)
        tracker.log({"loss/total": float(step)}, step)
        tracker.finish(143)
    # The clock went back by years between the first start and the others.
    for number, path in enumerate(wandb_files(tmp_path)[1:]):
        parent = path.parent
        parent.rename(parent.with_name(f"offline-run-2001010{9 - number}_000000-{tracker.run_id}"))
    assert values(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_no_key_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "wandb-key-0123456789"
    monkeypatch.setenv("WANDB_API_KEY", key)
    tracker = open_tracker(
        "offline", tmp_path, config={"note": f"key {key}"}, diff=f"+key = '{key}'\n"
    )
    tracker.summary({"said": f"with {key}"})
    tracker.finish(0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if key.encode() in path.read_bytes()] == []
