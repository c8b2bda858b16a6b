from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store import views
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.files import human_size
from rlhf_exp.store.lease import hold
from rlhf_exp.store.store import Store
from rlhf_exp.store.views import human_age


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
    with hold(store, "ppo", "bbb1"):
        rows = views.list_artifacts(store)
    assert [(row.key, row.state) for row in rows] == [
        ("aaa1", "done"),
        ("bbb1", "in progress"),
        ("ccc1", "unfinished"),
        ("ddd1", "damaged"),
    ]
    assert [row.bytes for row in rows[:3]] == [1_300_000, 5, 5]
    assert all(-1 < row.age_s < 60 for row in rows)
    text = views.table(rows)
    assert "4 entries, 2.6 MB" in text
    assert "1.3 MB" in text
    assert "0.1235" in text
    assert "process " in text
    assert max(map(len, text.splitlines())) <= 120
    assert max(map(len, views.table(rows, width=80).splitlines())) <= 80


def test_what_is_deleted_meanwhile_is_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = make(store, "sft", "aaa1"), make(store, "sft", "bbb1")
    every = store.all()
    (gone.path / MANIFEST).unlink()
    monkeypatch.setattr(store, "all", lambda: every)
    rows = views.list_artifacts(store)
    assert [row.key for row in rows if row.state == "done"] == [stays.key]


def test_an_empty_store(store: Store) -> None:
    assert views.list_artifacts(store) == []
    assert views.table([]) == "the store is empty\n"
    assert views.removal_table(store.gc([]), dry_run=True) == "nothing to delete\n"


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
    text = views.show(made)
    for part in ("ppo/aaa1", "sft bbb1", "reward[0]", "c0ffee (with changes)", "torch 2.13.0"):
        assert part in text
    for part in ("2.0 h", "model.bin", "1.3 MB", "0.25"):
        assert part in text


def test_many_files_are_cut_and_counted(store: Store) -> None:
    folder = store.staging("sft", "aaa1")
    for number in range(25):
        (folder / f"shard-{number:02d}").write_text("x")
    text = views.show(store.publish("sft", "aaa1", folder, Manifest("sft", "aaa1")))
    assert "... and 5 smaller ones" in text


def test_remove_asks_all_before_it_deletes_any(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "sft", "bbb1")
    with pytest.raises(UserError, match="no artifact"):
        views.remove(store, ["aaa1", "zzz"], dry_run=False)
    with hold(store, "sft", "bbb1"), pytest.raises(UserError, match="in use"):
        views.remove(store, ["aaa1", "bbb1"], dry_run=False)
    assert len(store.all()) == 2


def test_remove_names_what_was_made_from_it(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "ppo", "bbb1", parents={"sft": "aaa1"})
    text = views.remove(store, ["aaa"], dry_run=True)
    assert "1 would be deleted, 1.3 MB" in text
    assert "made from sft/aaa1 and kept: ppo/bbb1" in text
    assert "1 deleted" in views.remove(store, ["aaa"], dry_run=False)
    assert [one.key for one in store.all()] == ["bbb1"]


def test_gc(store: Store) -> None:
    make(store, "sft", "aaa1")
    make(store, "sft", "bbb1")
    assert (
        views.removal_table(store.gc(["aaa1"]), dry_run=False) == "nothing to delete\n"
    )  # made just now
    assert "1 would be deleted" in views.removal_table(
        store.gc(["aaa1"], True, grace_s=0), dry_run=True
    )
    assert "1 deleted" in views.removal_table(store.gc(["aaa1"], grace_s=0), dry_run=False)
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
