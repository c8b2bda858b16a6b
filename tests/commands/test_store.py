"""`rlhf-exp store ls` and `gc`, and the disk space in `status`, on the results of small runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_exp.commands import store as store_module
from rlhf_exp.commands.store import human_age, queued_keys
from rlhf_exp.errors import UserError
from rlhf_exp.launchers.slurm.submissions import Submission, SubmittedJob, new_submission
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.atomic_files import human_size
from rlhf_exp.store.lease import hold
from rlhf_exp.store.run_records import Records, RunRecord
from rlhf_exp.store.store import Store
from tests.commands.test_commands import refused, run_command
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
    assert "kept for now: 1 more" in run_command(capsys, run_copy, *rule)
    assert {one.key for one in store.all()} == before
    age(run_copy, hours=3)
    assert "1 would be deleted" in run_command(capsys, run_copy, *rule, "--dry-run")
    assert "nothing to delete" in run_command(
        capsys, run_copy, *rule, "--older-than", "4h", "--dry-run"
    )
    assert {one.key for one in store.all()} == before
    assert "1 deleted" in run_command(capsys, run_copy, *rule)
    assert {one.key for one in store.all()} == before - {gone}
    assert len(records.sweep("lrs")) == 2  # their numbers stay
    for wrong in (("--keep", "best:3"), ("--sweep", "lrs")):
        assert "go together" in refused(capsys, run_copy, "store", "gc", *wrong)
    assert "near it: lrs" in refused(capsys, run_copy, *rule[:3], "lr", *rule[4:])


def test_disk_space_is_shown(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next(iter(Records(run_copy / "sweeps").sweep("small"))).keys["ppo"]
    listed = run_command(capsys, run_copy, "store", "ls")
    (row,) = [line for line in listed.splitlines() if key in line]
    assert row.endswith("of small")
    (total,) = [line.split() for line in listed.splitlines() if line.startswith("small")]
    assert total[1] == "1"
    shown = run_command(capsys, run_copy, "status", "small").splitlines()[-1]
    assert shown.startswith(f"Disk space of small: {total[2]} {total[3]}: ")
    assert "Disk space" not in run_command(capsys, run_copy, "status")
    (run_copy / "sweeps" / "small").rename(run_copy / "elsewhere")
    (row,) = [
        line for line in run_command(capsys, run_copy, "store", "ls").splitlines() if key in line
    ]
    assert row.endswith("no run refers to it")


def submitted(outputs: Path, *ended: str, cancelled: str = "") -> set[str]:
    """Return the keys kept for two queued points and what they share, some points being done."""
    made: Submission = new_submission(outputs, "kl")
    for number, key in enumerate(("shared", "p1", "p2")):
        made.jobs.append(SubmittedJob(str(number), "ppo", key, (), 1, shared=not number))
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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, stage: str, key: str, **fields: object) -> Artifact:
    folder = store.staging(stage, key)
    (folder / "model.bin").write_bytes(b"x" * 1_300_000)
    return store.publish(stage, key, folder, Manifest(stage, key, **fields))  # type: ignore[arg-type]


def test_list_artifacts_in_every_state(store: Store) -> None:
    make(store, "sft", "aaa1", objective=0.123456)
    (store.staging("ppo", "bbb1") / "checkpoint").write_text("12345")
    (store.staging("ppo", "ccc1") / "checkpoint").write_text("12345")
    bad = make(store, "eval", "ddd1")
    (bad.path / MANIFEST).write_text("{")
    with hold(store.root, "ppo", "bbb1"):
        rows = store_module.list_artifacts(store)
    assert [(row.key, row.state) for row in rows] == [
        ("aaa1", "done"),
        ("bbb1", "in progress"),
        ("ccc1", "unfinished"),
        ("ddd1", "damaged"),
    ]
    assert [row.bytes for row in rows[:3]] == [1_300_000, 5, 5]
    assert all(-1 < row.age_s < 60 for row in rows)
    text = store_module.artifact_table(rows)
    assert "4 entries, 2.6 MB" in text
    assert "1.3 MB" in text
    assert "0.1235" in text
    assert "process " in text
    assert max(map(len, text.splitlines())) <= 120
    assert max(map(len, store_module.artifact_table(rows, width=80).splitlines())) <= 80


def test_what_is_deleted_meanwhile_is_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = make(store, "sft", "aaa1"), make(store, "sft", "bbb1")
    every = store.all()
    (gone.path / MANIFEST).unlink()
    monkeypatch.setattr(store, "all", lambda: every)
    rows = store_module.list_artifacts(store)
    assert [row.key for row in rows if row.state == "done"] == [stays.key]


def test_an_empty_store(store: Store) -> None:
    assert store_module.list_artifacts(store) == []
    assert store_module.artifact_table([]) == "the store is empty\n"
    assert store_module.removal_table(store.gc([]), dry_run=True) == "nothing to delete\n"


def test_show(store: Store) -> None:
    made = make(
        store,
        "ppo",
        "aaa1",
        parents={"sft": "bbb1"},
        metrics={"reward[0]": 1.5},
        git={"revision": "c0ffee", "dirty": True},
        versions={"torch": "2.13.0"},
        duration_s=7200.0,
        objective=0.25,
    )
    text = store_module.show(made)
    for part in ("ppo/aaa1", "sft bbb1", "reward[0]", "c0ffee (with changes)", "torch 2.13.0"):
        assert part in text
    for part in ("2.0 h", "model.bin", "1.3 MB", "0.25"):
        assert part in text


def test_many_files_are_cut_and_counted(store: Store) -> None:
    folder = store.staging("sft", "aaa1")
    for number in range(25):
        (folder / f"shard-{number:02d}").write_text("x")
    text = store_module.show(store.publish("sft", "aaa1", folder, Manifest("sft", "aaa1")))
    assert "... and 5 smaller ones" in text


def test_remove_asks_all_before_it_deletes_any(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "sft", "bbb1")
    with pytest.raises(UserError, match="no artifact"):
        store_module.remove(store, ["aaa1", "zzz"], dry_run=False)
    with hold(store.root, "sft", "bbb1"), pytest.raises(UserError, match="in use"):
        store_module.remove(store, ["aaa1", "bbb1"], dry_run=False)
    assert len(store.all()) == 2


def test_remove_names_what_was_made_from_it(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "ppo", "bbb1", parents={"sft": "aaa1"})
    text = store_module.remove(store, ["aaa"], dry_run=True)
    assert "1 would be deleted, 1.3 MB" in text
    assert "made from sft/aaa1 and kept: ppo/bbb1" in text
    assert "1 deleted" in store_module.remove(store, ["aaa"], dry_run=False)
    assert [one.key for one in store.all()] == ["bbb1"]


def test_gc(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "sft", "bbb1")
    assert (
        store_module.removal_table(store.gc(["aaa1"]), dry_run=False) == "nothing to delete\n"
    )  # made just now
    assert "1 would be deleted" in store_module.removal_table(
        store.gc(["aaa1"], True, grace_s=0), dry_run=True
    )
    assert "1 deleted" in store_module.removal_table(store.gc(["aaa1"], grace_s=0), dry_run=False)
    assert [one.key for one in store.all()] == ["aaa1"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940, "9.9 kB"),
        (9_960, "10 kB"),
        (999_499, "999 kB"),
        (999_600, "1.0 MB"),
        (12_345_678_901, "12 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_human_size(size: float, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (12, "12 s"), (300, "5 min"), (11_520, "3.2 h"), (345_600, "4.0 days")],
)
def test_human_age(seconds: float, text: str) -> None:
    assert human_age(seconds) == text
