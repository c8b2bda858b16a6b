"""Whole runs, and what of them arrives at W&B."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.pipeline.inputs import weights_digest
from rlhf_exp.tracking.local import read_metrics
from rlhf_exp.tracking.wandb_log import read_wandb_file, wandb_files
from tests.lab import LAUNCH, ROOT, artifact, launch, small
from tests.tracking.server import ReceivedArtifact, ReceivedRun, WandbServer

STAGES = ("sft", "reward", "ppo", "eval")


def by_stage(server: WandbServer) -> dict[str, ReceivedRun]:
    assert len(server.runs) == len({run.job_type for run in server.runs.values()})
    return {run.job_type: run for run in server.runs.values()}


def models(server: WandbServer) -> dict[str, ReceivedArtifact]:
    return {one.name.split("-")[0]: one for one in server.artifacts if one.kind == "model"}


def test_a_run_of_all_stages(server: WandbServer, tmp_path: Path) -> None:
    given = ("tracking=online", "name=study", "tracking.tags=[first]")
    assert launch(tmp_path, *given, "tracking.alerts.entropy_fraction=9") == 0
    runs = by_stage(server)
    assert tuple(runs) == STAGES
    assert server.unknown == []
    for stage, run in runs.items():
        found = artifact(tmp_path, stage)
        assert (run.group, run.tags, run.exit_code) == ("study", ["first"], 0)
        assert run.name.startswith(f"{stage} suite=quick" if stage == "eval" else f"{stage} lr=")
        assert run.config["ppo"]["rollouts"] == 8
        assert run.config["lineage"]["key"] == found.key
        assert run.config["lineage"].get("parents", {}) == found.manifest.parents
        assert run.config["git"].get("revision") == found.manifest.git.get("revision")
        local = read_metrics(found.path / "metrics.jsonl")
        assert run.column("global_step") == [row["global_step"] for row in local]
        assert run.run_id == found.manifest.wandb_run_id

    # The report links to the runs, and is a file of the last one.
    final = artifact(tmp_path, "eval")
    report = tmp_path / "reports" / f"eval-{final.key}.html"
    assert runs["eval"].files["report.html"] == report.read_bytes()
    page = report.read_text()
    for stage, run in runs.items():
        assert f'{run.run_id}" rel="noreferrer">W&amp;B: {stage}</a>' in page

    # What the children say they were made from is what the parents say they made.
    made = models(server)
    assert set(made) == {"sft", "reward", "ppo"}
    for stage, model in made.items():
        found = artifact(tmp_path, stage)
        assert model.metadata["digest"] == weights_digest(found)
        weights = model.manifest["contents"]["model.safetensors"]
        assert weights["ref"] == (found.path / "model" / "model.safetensors").as_uri()
    inputs = runs["ppo"].config["lineage"]["inputs"]
    assert inputs == {role: made[role].metadata["digest"] for role in ("sft", "reward")}

    rows = [row for row in runs["ppo"].history if "reward/histogram" in row]
    assert len(rows) == 3  # 6 steps, 2 of an iteration
    for one in rows:
        assert sum(one["reward/histogram"]["values"]) == 8  # rollouts
        edges = one["reward/histogram"]["bins"]
        low, high = one["reward/min"], one["reward/max"]
        assert (edges[0], edges[-1]) == pytest.approx((low, high), rel=1e-5)
        assert sum(one["kl/histogram"]["values"]) == 8
    assert [title for title, _ in runs["ppo"].alerts] == ["Entropy has collapsed"]
    assert (
        runs["reward"].summary["test/accuracy"]
        == artifact(tmp_path, "reward").manifest.metrics["test/accuracy"]
    )
    assert {"ppo/eval/samples", "eval/side_by_side"} <= {
        key for run in runs.values() for row in run.history for key in row
    }


def test_divergence_is_an_alert(tmp_path: Path) -> None:
    given = ("stage=sft", "sft.lr=1e30", "sft.warmup_steps=0", "tracking=disabled")
    assert launch(tmp_path, *given) != 0
    (path,) = tmp_path.glob("store/.staging/sft-*/alerts.jsonl")
    (alert,) = map(json.loads, path.read_text().splitlines())
    assert alert["title"] == "Training has diverged"


@pytest.mark.slow
def test_two_processes_make_one_run(server: WandbServer, tmp_path: Path) -> None:
    given = small(tmp_path, "tracking=online", "distributed=ddp", "distributed.processes=2")
    done = subprocess.run([sys.executable, str(LAUNCH), *given], cwd=ROOT, check=False)
    assert done.returncode == 0
    runs = by_stage(server)
    assert tuple(runs) == STAGES
    for run in runs.values():
        steps = run.column("global_step")
        assert steps == sorted(set(steps))
        assert run.upserts >= 1
    histogram = runs["ppo"].column("reward/histogram")[0]
    assert sum(histogram["values"]) == 8  # of both processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_the_same_run(
    server: WandbServer, tmp_path: Path, number: signal.Signals
) -> None:
    # W&B sends rows every few seconds: the run must outlast the first ones.
    given = small(tmp_path, "tracking=online", "stage=sft", "sft.steps=300")
    command = [sys.executable, str(LAUNCH), *given]
    first = subprocess.Popen(command, cwd=ROOT)
    while not any(len(run.history) > 4 for run in server.runs.values()):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(number)
    assert first.wait(timeout=60) == (143 if number == signal.SIGTERM else -number)
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    run = server.run
    assert run.column("global_step") == list(range(301))
    assert run.exit_code == 0
    assert run.preempting == (number == signal.SIGTERM)
    found = artifact(tmp_path, "sft")
    paths = wandb_files(found.path)
    assert len(paths) == 2
    assert {read_wandb_file(path).run_id for path in paths} == {run.run_id}
