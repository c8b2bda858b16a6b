"""`rlhf-exp sync` with the real `wandb sync` and a stand-in server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb

from rlhf_exp.cli import main
from rlhf_exp.store.artifact import Manifest
from rlhf_exp.store.lease import hold
from rlhf_exp.store.run_records import Records, RunRecord
from rlhf_exp.store.store import Store
from rlhf_exp.tracking import wandb_sync, wandb_tracker
from rlhf_exp.tracking.create import Mode, open_tracker
from rlhf_exp.tracking.local import noted_url
from rlhf_exp.tracking.wandb_log import copy_log, read_wandb_file, synced_marker, wandb_files
from rlhf_exp.tracking.wandb_sync import RunStart, unsent
from tests.tracking.server import WandbServer
from tests.tracking.service import kill_service

KEY = "0123456789abcdef"
FOREVER = float("inf")


def start(online: bool = False, steps: tuple = (), sent: float | None = None) -> RunStart:
    return RunStart(Path("run-a.wandb"), "a", "p", "", online, True, steps, sent)


def spans(*starts: RunStart) -> list[tuple[int, float, float]]:
    return [(starts.index(one.start), one.after, one.before) for one in unsent(starts)]


def test_which_rows_of_which_start_are_sent() -> None:
    one, two = start(steps=(0, 1, 2, 3, 4)), start(steps=(3, 4, 5))
    assert spans(one) == [(0, -FOREVER, FOREVER)]
    # The second start began again after step 2.
    assert spans(one, two) == [(0, -FOREVER, 3), (1, 2, FOREVER)]
    # A start without a row, killed at once, changes nothing.
    assert spans(one, start(), two) == [(0, -FOREVER, 3), (1, 2, 3), (2, 2, FOREVER)]


def test_what_a_start_ran_itself_replaces_what_the_starts_before_it_logged() -> None:
    """And the rows before that, which no log held, replace nothing."""
    one = start(steps=(0, 1, 2, 3, 6, 7))
    two = replace(start(steps=(4, 5, 6, 7, 8)), first=6)
    assert [piece.steps for piece in unsent([one, two])] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_rows_that_no_log_holds_follow_once() -> None:
    one, lost = start(steps=(0, 1)), replace(start(steps=(2, 3)), rows=({}, {}))
    assert [piece.steps for piece in unsent([one, lost])] == [[0, 1], [2, 3]]
    assert [piece.steps for piece in unsent([one, lost], after=2)] == [[], [3]]
    assert [piece.steps for piece in unsent([one, lost], after=3)] == [[]]


def test_what_was_sent_before_the_resume_is_not_sent_again() -> None:
    one = start(steps=(0, 1, 2, 3, 4), sent=4)
    assert spans(one, start(steps=(3, 4, 5))) == [(1, 4, FOREVER)]
    # Sent up to 2 only, because the second start was known.
    assert spans(start(steps=(0, 1, 2, 3), sent=2), start(steps=(3, 4))) == [(1, 2, FOREVER)]


def test_starts_that_were_online() -> None:
    offline, online = start(steps=(0, 1)), start(True, (0, 1, 2), sent=2)
    assert spans(offline, online) == []
    assert spans(offline, online, start(steps=(2, 3))) == [(2, 2, FOREVER)]
    lost = start(True, (0, 1, 2))
    assert spans(offline, lost) == [(1, -FOREVER, FOREVER)]
    assert [piece.steps for piece in unsent([offline, lost], after=1)] == [[2]]
    refused = start(True)  # the server was away, so that the next start was an offline one
    assert spans(refused, offline) == [(1, -FOREVER, FOREVER)]


def test_a_copied_log_is_the_log(tmp_path: Path) -> None:
    tracker = open_tracker("offline", tmp_path)
    for step in range(4):
        tracker.log({"x": float(step)}, step, more=True)
        tracker.table("samples", ["text"], [["x" * 40_000]], step)  # config and rows: many blocks
        tracker.log({"text": step}, step)
    tracker.summary({"long": "y" * 100_000})
    tracker.finish(3)
    (path,) = wandb_files(tmp_path)
    whole = read_wandb_file(path)
    copy_log(path, tmp_path / "copy", lambda row: True, tmp_path)
    assert read_wandb_file(tmp_path / "copy") == whole
    copy_log(path, tmp_path / "copy", lambda row: row["global_step"] % 2 == 0, tmp_path)
    part = read_wandb_file(tmp_path / "copy")
    assert [row["global_step"] for row in part.history] == [0, 2]
    assert (part.summary, part.exit_code) == (whole.summary, 3)


class Recorded:
    """An output folder with one run of one stage."""

    def __init__(self, folder: Path) -> None:
        self.outputs = folder / "outputs"
        self.store = Store(self.outputs / "store")
        Records(self.outputs / "sweeps").write(RunRecord("study", "sft", {"sft": KEY}))

    @property
    def folder(self) -> Path:
        found = self.store.lookup("sft", KEY)
        return found.path if found else self.store.staging("sft", KEY)

    def run(self, *steps: int, mode: Mode = "offline", code: int = 143) -> str:
        """Start or resume the run and log some steps."""
        resume = steps[0] - 1 if steps[0] else None
        tracker = open_tracker(mode, self.folder, job_type="sft", name="sft-01", resume_step=resume)
        for step in steps:
            if step % 2 == 0:
                tracker.table("eval/samples", ["text"], [[f"step {step}"]], step)
            tracker.log({"loss/total": step / 4}, step)
        tracker.finish(code)
        return tracker.run_id

    def publish(self) -> None:
        manifest = Manifest(stage="sft", key=KEY)
        self.store.publish("sft", KEY, self.folder, manifest, ("checkpoints/*",))

    def sync(self, *options: str) -> int:
        return main(["--outputs", str(self.outputs), "sync", "study", *options])


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def test_a_resumed_and_published_run_arrives_as_one(
    server: WandbServer, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = recorded.run(0, 1, 2, 3, 4)
    recorded.run(3, 4, 5, 6, code=0)
    recorded.publish()
    report = recorded.outputs / "reports" / f"sft-{KEY}.html"
    report.parent.mkdir()
    report.write_text("<p>the report")
    assert recorded.sync("--dry-run") == 0
    assert "7 rows of 2 starts" in capsys.readouterr().out
    assert server.runs == {}
    assert recorded.sync() == 0
    assert f"{server.url}/" in capsys.readouterr().out
    assert server.unknown == []
    # The report is at the run, and the run's address where reports look for it.
    assert server.run.files["report.html"] == b"<p>the report"
    assert noted_url(recorded.folder).endswith(f"/runs/{run_id}")  # type: ignore[union-attr]
    assert server.run.run_id == run_id
    assert server.run.column("global_step") == [0, 1, 2, 3, 4, 5, 6]
    assert server.run.column("sft/loss/total") == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    steps = server.run.column("_step")
    assert steps == sorted(set(steps))
    assert server.run.exit_code == 0
    # Tables too, although the folder has moved since.
    name = "sft/eval/samples.table.json"
    tables = [one.files[name] for one in server.artifacts if one.committed]
    assert json.loads(tables[-1])["data"] == [["step 6"]]
    assert all(one.committed for one in server.artifacts)

    rows = list(server.run.history)
    assert recorded.sync() == 0
    assert "sent before" in capsys.readouterr().out
    assert server.run.history == rows
    assert all(synced_marker(path).exists() for path in wandb_files(recorded.folder))


@pytest.mark.slow
def test_what_is_sent_between_two_starts_is_not_sent_again(
    server: WandbServer, recorded: Recorded
) -> None:
    recorded.run(0, 1, 2, 3, 4)
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2, 3, 4]
    recorded.run(3, 4, 5, code=0)
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2, 3, 4, 5]


def test_an_online_run_continued_offline_is_completed(
    server: WandbServer, recorded: Recorded
) -> None:
    recorded.run(0, 1, mode="online")
    (done,) = wandb_files(recorded.folder)
    assert synced_marker(done).exists()
    recorded.run(2, code=0)
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2]


@pytest.mark.slow
def test_an_online_run_that_lost_its_server_is_completed(
    server: WandbServer, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_S", 1.0)
    tracker = open_tracker("online", recorded.folder)
    for step in (0, 1):
        tracker.log({"loss/total": 0.5}, step)
    while len(server.run.history) < 2:
        time.sleep(0.05)
    server.stop()
    for step in (2, 3):
        tracker.log({"loss/total": 0.5}, step)
    tracker.finish(0)
    server.start()
    assert server.run.column("global_step") == [0, 1]
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2, 3]
    assert server.run.exit_code == 0


def test_rows_that_wandb_lost_are_sent_from_the_local_record(
    server: WandbServer, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was killed and could not be started again; the stage went on to its end."""
    monkeypatch.setattr(wandb_tracker, "RESTARTS", 0)
    tracker = open_tracker("offline", recorded.folder, job_type="sft", name="sft-01")
    tracker.log({"loss/total": 0.0}, 0)
    tracker.log({"loss/total": 0.25}, 1)
    time.sleep(1.5)  # until it is on disk
    kill_service()
    tracker.log({"loss/total": float("nan")}, 2)
    tracker.log({"loss/total": 0.75}, 3)
    tracker.finish(0)
    assert recorded.sync() == 0
    assert server.unknown == []
    assert server.run.column("global_step") == [0, 1, 2, 3]
    assert server.run.column("sft/loss/total")[-1] == 0.75
    steps = server.run.column("_step")
    assert steps == sorted(set(steps))
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2, 3]


ERROR = json.dumps({"errors": [{"message": f"rate limit for {'0' * 40}"}]}).encode()


@pytest.mark.parametrize(
    ("status", "body"), [(200, ERROR), (200, b"[" * 50_000), (200, b'{"data": null}')]
)
def test_a_server_that_answers_with_an_error_stops_no_other_run(
    status: int,
    body: bytes,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded.run(0, 1)
    other = open_tracker("offline", recorded.store.staging("reward", KEY))
    other.log({"loss/total": 1.0}, 7)
    other.finish(1)
    keys = {"sft": KEY, "reward": KEY}
    Records(recorded.outputs / "sweeps").write(RunRecord("study", "reward", keys))
    with answering(status, body) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        assert recorded.sync() == 2
    shown = capsys.readouterr()
    assert shown.out.count(" failed ") == 2
    assert "W&B does not say what it has of the run" in shown.out
    assert "2 runs were not sent; the same command tries them again" in shown.err
    assert "0" * 40 not in shown.out + shown.err


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Yield the address of a server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_in_progress_is_left_alone(
    server: WandbServer, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.run(0, 1)
    with hold(recorded.store.root, "sft", KEY):
        assert recorded.sync() == 0
    assert "running" in capsys.readouterr().out
    assert server.runs == {}


def test_a_damaged_log_does_not_hide_the_others(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.run(0, 1)
    other = recorded.store.staging("reward", KEY)
    log = other / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"something else")
    keys = {"reward": KEY, "sft": KEY}
    Records(recorded.outputs / "sweeps").write(RunRecord("study", "sft", keys))
    assert recorded.sync("--dry-run") == 2
    lines = capsys.readouterr().out.splitlines()
    (reward,) = [line for line in lines if line.startswith("reward")]
    assert " failed " in reward
    assert any(line.startswith("sft") and "2 rows of 1 starts" in line for line in lines)


@pytest.mark.slow
def test_failures_do_not_stop_the_others_and_can_be_repeated(
    server: WandbServer,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_id = recorded.run(0, 1)
    other = open_tracker("offline", recorded.store.staging("reward", KEY))
    other.log({"loss/total": 1.0}, 7)
    other.finish(1)
    keys = {"sft": KEY, "reward": KEY}
    Records(recorded.outputs / "sweeps").write(RunRecord("study", "reward", keys))
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert recorded.sync() == 2
    found = capsys.readouterr()
    assert found.out.count(" failed ") == 2
    assert "2 runs were not sent" in found.err
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert recorded.sync() == 0
    steps = {run.run_id: run.column("global_step") for run in server.runs.values()}
    assert steps == {run_id: [0, 1], other.run_id: [7]}


@pytest.mark.slow
def test_sending_that_was_cut_off_is_continued_without_sending_rows_twice(
    server: WandbServer, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wandb_sync._wandb_sync

    def cut_off(folder: Path) -> str:
        said = real(folder)
        next(folder.glob("*.synced")).unlink()
        return said

    recorded.run(0, 1, 2, 3)
    recorded.run(3, 4)
    with monkeypatch.context() as patch:
        patch.setattr(wandb_sync, "_wandb_sync", cut_off)
        assert recorded.sync() == 2
    assert server.run.column("global_step") == [0, 1, 2]
    assert recorded.sync() == 0
    assert server.run.column("global_step") == [0, 1, 2, 3, 4]


def test_a_server_out_of_reach_is_said_at_once(
    server: WandbServer, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.run(0, 1)
    server.stop()
    assert recorded.sync() == 2
    assert f"cannot be reached at {server.url}" in capsys.readouterr().err
