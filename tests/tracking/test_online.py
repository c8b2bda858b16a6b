"""W&B online: what the real client sends to a server, and what happens when it is away."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.tracking import wandb_tracker
from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.local import read_metrics, read_table
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.tracking.wandb_log import joined_history, read_wandb_file, wandb_files
from tests.tracking.server import WandbServer


def opened(folder: Path, **given: Any) -> Tracker:
    return open_tracker("online", folder, project="project", **given)


def log_steps(tracker: Tracker, *steps: int) -> None:
    for step in steps:
        tracker.log({"reward/mean": step / 2}, step)


def test_everything_arrives(server: WandbServer, tmp_path: Path) -> None:
    tracker = opened(
        tmp_path / "run",
        group="sweep",
        job_type="ppo",
        name="ppo-1234",
        tags=["a", "b"],
        config={"ppo": {"lr": 1e-6}, "lineage": {"parents": {"sft": "abcd"}}},
        diff="--- a\n+++ b\n",
    )
    for step in (1, 2):
        tracker.histogram("reward/histogram", [0.0, 0.0, 1.0, float("nan")], step)
        tracker.log({"reward/mean": 1 / 3}, step, more=True)
        tracker.table("eval/samples", ["answer", "score"], [["<b>yes", step]], step)
        tracker.log({"eval/reward_mean": step}, step)
    tracker.alert("KL", "too far", 2)
    model = tmp_path / "run" / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    tracker.model("ppo-1234", model, tmp_path / "store" / "model", {"digest": "d1"})
    tracker.summary({"best": 2.5})
    tracker.finish()
    run = server.run
    assert server.unknown == []
    assert (run.run_id, run.project, run.group) == (tracker.run_id, "project", "sweep")
    assert (run.job_type, run.name, run.tags) == ("ppo", "ppo-1234", ["a", "b"])
    assert run.config["ppo"] == {"lr": 1e-6}
    assert run.config["lineage"] == {"parents": {"sft": "abcd"}}
    assert run.exit_code == 0
    assert run.summary["best"] == 2.5
    assert run.column("global_step") == [1, 2]
    assert run.column("reward/mean") == pytest.approx([1 / 3, 1 / 3])
    assert run.column("ppo/eval/reward_mean") == [1, 2]  # SFT logs `eval/...`, too
    counts = [histogram["values"] for histogram in run.column("reward/histogram")]
    # Two zeros, in the first of 64 bins, and a one, in the last.
    assert counts == [[2] + 62 * [0] + [1]] * 2
    assert run.files["git-diff.patch"] == b"--- a\n+++ b\n"
    assert run.alerts == [("KL", "Step 2: too far")]
    tables = [one for one in server.artifacts if one.kind == "run_table"]
    rows = [json.loads(one.files["ppo/eval/samples.table.json"])["data"] for one in tables]
    assert rows == [[["<b>yes", 1]], [["<b>yes", 2]]]
    (made,) = [one for one in server.artifacts if one.kind == "model"]
    assert (made.name, made.metadata, made.committed) == ("ppo-1234", {"digest": "d1"}, True)
    (entry,) = made.manifest["contents"].values()
    assert entry["ref"] == (tmp_path / "store" / "model" / "model.safetensors").as_uri()
    assert entry["size"] == 7
    assert made.files == {}


def test_a_server_lost_and_found_again_misses_nothing(server: WandbServer, tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    log_steps(tracker, 1, 2)
    server.stop()
    log_steps(tracker, 3, 4)
    tracker.alert("KL", "too far", 4)
    server.start()
    log_steps(tracker, 5)
    tracker.finish()
    assert server.run.column("global_step") == [1, 2, 3, 4, 5]
    assert server.run.column("reward/mean") == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert server.run.alerts == [("KL", "Step 4: too far")]
    assert server.run.exit_code == 0


@pytest.mark.slow  # the client waits for some twenty seconds
def test_a_table_of_a_time_without_a_server_is_sent_at_the_end(
    server: WandbServer, tmp_path: Path
) -> None:
    tracker = opened(tmp_path)
    server.stop()
    tracker.table("eval/samples", ["answer"], [["yes"]], 1)
    log_steps(tracker, 1)
    server.start()
    tracker.finish()
    (table,) = server.artifacts
    assert json.loads(table.files["eval/samples.table.json"])["data"] == [["yes"]]
    assert server.run.column("global_step") == [1]
    assert server.run.summary["eval/samples"]["nrows"] == 1
    assert read_table(tmp_path, "eval/samples") == [{"answer": "yes"}]


def test_a_server_that_stays_away_holds_no_run_for_long(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_S", 1.0)
    tracker = opened(tmp_path)
    log_steps(tracker, 1)
    server.stop()
    log_steps(tracker, 2)
    tracker.finish()
    assert "rlhf-exp sync" in caplog.text
    (path,) = wandb_files(tmp_path)
    assert [row["global_step"] for row in read_wandb_file(path).history] == [1, 2]


def test_a_server_absent_at_the_start_makes_the_run_an_offline_one(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_tracker, "START_S", 1.0)
    server.stop()
    with caplog.at_level(logging.WARNING):
        tracker = opened(tmp_path)
    log_steps(tracker, 1, 2)
    tracker.finish()
    assert "recorded offline; `rlhf-exp sync` sends it later" in caplog.text
    offline = [path for path in wandb_files(tmp_path) if "offline-run" in str(path)]
    assert [row["global_step"] for row in joined_history(offline)] == [1, 2]
    assert server.runs == {}


def test_a_resumed_run_is_one_run_with_one_row_a_step(server: WandbServer, tmp_path: Path) -> None:
    first = opened(tmp_path)
    log_steps(first, 1, 2, 3, 4, 5)
    first.finish(143)
    second = opened(tmp_path, resume_step=3)
    second.table("eval/samples", ["answer"], [["again"]], 4)
    second.alert("KL", "again", 5)
    log_steps(second, 4, 5, 6, 7)
    second.finish()
    assert second.run_id == first.run_id
    assert server.run.column("global_step") == [1, 2, 3, 4, 5, 6, 7]
    assert server.run.exit_code == 0
    assert (server.artifacts, server.run.alerts) == ([], [])
    local = [row["global_step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert local == [1, 2, 3, 4, 5, 6, 7]


def test_a_resumed_run_first_sends_what_the_server_has_missed(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_S", 1.0)
    tracker = opened(tmp_path)
    log_steps(tracker, 1, 2)
    server.stop()
    log_steps(tracker, 3, 4)
    tracker.finish(143)  # in vain
    server.start()
    lacking = server.run.column("global_step")
    resumed = opened(tmp_path, resume_step=4)
    log_steps(resumed, 5)
    resumed.finish()
    assert len(lacking) <= 2
    assert server.run.column("global_step") == [1, 2, 3, 4, 5]
    assert server.run.column("reward/mean") == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_run_begun_offline_is_continued_online_with_all_its_rows(
    server: WandbServer, tmp_path: Path
) -> None:
    offline = open_tracker("offline", tmp_path)
    log_steps(offline, 1, 2, 3)
    offline.finish(143)
    online = opened(tmp_path, resume_step=2)
    log_steps(online, 3, 4)
    online.finish()
    assert server.run.run_id == offline.run_id
    assert server.run.column("global_step") == [1, 2, 3, 4]


def test_the_step_of_an_evaluation_is_one_row_even_if_it_fails(
    server: WandbServer, tmp_path: Path
) -> None:
    tracker = opened(tmp_path)
    log_steps(tracker, 1)
    tracker.log({"reward/mean": 7.0}, 2, more=True)
    tracker.finish(1)
    assert server.run.column("reward/mean") == [0.5, 7.0]


def test_wandbs_names_are_still_there() -> None:
    """What is used of wandb beyond its documented interface."""
    assert {"x_transaction_log_flush_interval", "finish_timeout_raises"} <= set(
        wandb_tracker.wandb.Settings.model_fields
    )
