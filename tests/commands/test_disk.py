"""`rlhf-exp store ls` and `gc`, and the disk space in `status`, on the results of small runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_exp.commands.disk import queued_keys
from rlhf_exp.slurm.submission import Job, Submission, new_submission
from rlhf_exp.store.records import Records, RunRecord
from rlhf_exp.store.store import Store
from tests.commands.test_commands import refused, told
from tests.lab import run


def age(outputs: Path, hours: float) -> None:
    """Pretend that nothing has been used for so long."""
    for one in Store(outputs / "store").all():
        manifest = one.path / "manifest.json"
        used = manifest.stat().st_mtime - hours * 3600
        os.utime(manifest, (used, used))


def test_the_best_of_a_sweep_stay(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lr in ("1e-3", "1e-4"):
        run(run_copy, "name=lrs", "stage=ppo", f"ppo.lr={lr}")
    store, records = Store(run_copy / "store"), Records(run_copy / "sweeps")
    points = sorted(records.sweep("lrs"), key=lambda one: one.objective or 0)
    assert len(points) == 2
    before = {one.key for one in store.all()}
    rule = ("store", "gc", "--sweep", "lrs", "--keep", "best:0")
    # The first one is also that of the run `small`, which keeps it.
    kept = {key for one in records.sweep("small") for key in one.keys.values()}
    (gone,) = {one.key for one in points} - kept
    assert "kept for now: 1 more" in told(capsys, run_copy, *rule)
    assert {one.key for one in store.all()} == before
    age(run_copy, hours=3)
    assert "1 would be deleted" in told(capsys, run_copy, *rule, "--dry-run")
    assert "nothing to delete" in told(capsys, run_copy, *rule, "--older-than", "4h", "--dry-run")
    assert {one.key for one in store.all()} == before
    assert "1 deleted" in told(capsys, run_copy, *rule)
    assert {one.key for one in store.all()} == before - {gone}
    assert len(records.sweep("lrs")) == 2  # their numbers stay
    for wrong in (("--keep", "best:3"), ("--sweep", "lrs")):
        assert "go together" in refused(capsys, run_copy, "store", "gc", *wrong)
    assert "near it: lrs" in refused(capsys, run_copy, *rule[:3], "lr", *rule[4:])


def test_disk_space_is_shown(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next(iter(Records(run_copy / "sweeps").sweep("small"))).keys["ppo"]
    listed = told(capsys, run_copy, "store", "ls")
    (row,) = [line for line in listed.splitlines() if key in line]
    assert row.endswith("of small")
    (total,) = [line.split() for line in listed.splitlines() if line.startswith("small")]
    assert total[1] == "1"
    shown = told(capsys, run_copy, "status", "small").splitlines()[-1]
    assert shown.startswith(f"Disk space of small: {total[2]} {total[3]}: ")
    assert "Disk space" not in told(capsys, run_copy, "status")
    (run_copy / "sweeps" / "small").rename(run_copy / "elsewhere")
    (row,) = [line for line in told(capsys, run_copy, "store", "ls").splitlines() if key in line]
    assert row.endswith("no run refers to it")


def submitted(outputs: Path, *ended: str, cancelled: str = "") -> set[str]:
    """Return the keys kept for two queued points and what they share, some points being done."""
    made: Submission = new_submission(outputs, "kl")
    for number, key in enumerate(("shared", "p1", "p2")):
        made.jobs.append(Job(str(number), "ppo", key, (), 1, shared=not number))
    made.cancelled.extend(cancelled.split())
    made.write()
    records = Records(outputs / "sweeps")
    for key in ended:
        records.write(RunRecord("kl", "ppo", {"sft": "shared", "ppo": key}))
    return queued_keys(outputs, records)


def test_what_waits_in_a_queue_keeps_what_it_shares(tmp_path: Path) -> None:
    assert submitted(tmp_path / "none") == {"shared", "p1", "p2"}
    assert submitted(tmp_path / "one", "p1") == {"shared", "p2"}
    assert submitted(tmp_path / "all", "p1", "p2") == set()
    assert submitted(tmp_path / "cancelled", "p1", cancelled="0 2") == set()
