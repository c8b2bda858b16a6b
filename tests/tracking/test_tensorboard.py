"""Event files, as TensorBoard's own reader reads them back.

TensorBoard is an extra, so these tests have a mark of their own: `make test MARKERS=tensorboard`,
after `pip install tensorboard`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.local import read_metrics
from tests.lab import LAUNCH, ROOT, artifact, launch, small

pytestmark = pytest.mark.tensorboard


def read(folder: Path) -> Any:
    """Return what TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=everything)
    events.Reload()
    return events


def points(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def text(events: Any, name: str) -> list[tuple[int, str]]:
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def opened(folder: Path, resume_step: int | None = None) -> Any:
    return open_tracker(
        "disabled",
        folder,
        also=["tensorboard"],
        job_type="ppo",
        name="ppo lr=1e-3",
        config={"ppo": {"lr": 1e-3}},
        resume_step=resume_step,
    )


def test_everything_that_is_reported(tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    tracker.histogram("kl/histogram", [0.0, 1.0, 1.0, float("nan")], 2)
    rows = [[f"a|b\n{number}", "<b>x</b>"] for number in range(25)]
    rows[1] = ["\ud800" + "y" * 2000, "<b>x</b>"]
    tracker.table("eval/samples", ["prompt", "answer"], rows, 2)
    tracker.log({"reward/mean": 0.5, "loss/total": 2.0}, 2)
    tracker.alert("KL is high", "lower ppo.lr", 2)
    tracker.summary({"published_step": 2.0})
    tracker.finish()
    tracker.finish()
    events = read(tmp_path)
    # Names that several stages log begin with the stage.
    assert points(events, "reward/mean") == [(2, 0.5)]
    assert points(events, "ppo/loss/total") == [(2, 2.0)]
    (histogram,) = events.Histograms("kl/histogram")
    assert (histogram.step, histogram.histogram_value.num) == (2, 3.0)
    ((step, table),) = text(events, "ppo/eval/samples")
    lines = table.splitlines()
    assert (step, lines[0], lines[1]) == (2, "| prompt | answer |", "| --- | --- |")
    assert lines[2] == r"| a\|b 0 | <b>x</b> |"
    assert lines[3] == f"| ?{'y' * 999}… | <b>x</b> |"
    assert table.count("<b>x</b>") == 20
    assert "5 more rows are in tables/" in table
    assert text(events, "alerts") == [(2, "**KL is high** at step 2: lower ppo.lr")]
    assert '"published_step": 2.0' in text(events, "summary")[0][1]
    assert text(events, "run")[0][1].startswith("ppo lr=1e-3 (")
    assert '"lr": 0.001' in text(events, "config")[0][1]


def test_a_resume_doubles_no_step_and_a_fresh_start_keeps_none(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for step in range(1, 8):
        first.log({"reward/mean": float(step)}, step)  # flushed: a kill may come here
    resumed = opened(tmp_path, resume_step=4)  # from the checkpoint of step 4
    for step in range(5, 10):
        resumed.log({"reward/mean": 10.0 * step}, step)
    resumed.finish()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    expected += [(step, 10.0 * step) for step in range(5, 10)]
    assert points(read(tmp_path), "reward/mean") == expected
    afresh = opened(tmp_path)
    afresh.log({"reward/mean": 7.0}, 1)
    afresh.finish()
    assert points(read(tmp_path), "reward/mean") == [(1, 7.0)]
    first.finish()


def test_a_run_of_all_stages(tmp_path: Path) -> None:
    assert launch(tmp_path, "tracking.also=[tensorboard]") == 0
    for stage, name in (
        ("sft", "sft/loss/total"),
        ("reward", "reward/reward/accuracy"),
        ("ppo", "reward/mean"),
        ("eval", "eval/outcome/wins"),
    ):
        folder = artifact(tmp_path, stage).path
        own = name if stage in ("ppo", "eval") else name.removeprefix(f"{stage}/")
        local = read_metrics(folder / "metrics.jsonl")
        logged = [(int(row["global_step"]), row[own]) for row in local if own in row]
        found = points(read(folder), name)
        assert [step for step, _ in found] == [step for step, _ in logged]
        assert [value for _, value in found] == pytest.approx([v for _, v in logged], rel=1e-6)


def test_a_killed_run_shows_each_step_once(tmp_path: Path) -> None:
    given = small(
        tmp_path, "tracking.also=[tensorboard]", "stage=sft", "sft.steps=60", "sft.eval_every=100"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(LAUNCH), *given]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not any(
        "step-0000001" in path.name
        for path in tmp_path.glob("store/.staging/sft-*/checkpoints/step-*")
    ):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    found = read(artifact(tmp_path, "sft").path)
    assert [event.step for event in found.Scalars("sft/loss/total")] == list(range(1, 61))
    assert len(list((artifact(tmp_path, "sft").path / "tensorboard").iterdir())) == 2
