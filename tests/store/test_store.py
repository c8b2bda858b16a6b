import os
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, stage: str, key: str, **fields: object) -> Artifact:
    folder = store.staging(stage, key)
    (folder / "model.bin").write_text(f"{stage} {key}")
    return store.publish(stage, key, folder, Manifest(stage, key, **fields))  # type: ignore[arg-type]


def test_an_empty_store_answers_and_writes_nothing(store: Store) -> None:
    assert store.lookup("sft", "abc1") is None
    assert store.find("a") == []
    assert store.all() == []
    assert store.damaged() == []
    assert store.unfinished("sft", "abc1") is None
    assert not store.root.exists()


def test_what_is_published_is_found(store: Store) -> None:
    made = make(store, "sft", "abc1", metrics={"loss": 1.5})
    found = store.lookup("sft", "abc1")
    assert found == made
    assert found.path == store.root / "sft" / "abc1"
    assert found.manifest.metrics == {"loss": 1.5}
    assert (found.path / "model.bin").read_text() == "sft abc1"
    assert store.lookup("ppo", "abc1") is None
    assert store.lookup("sft", "abc2") is None


def test_staging_is_kept_for_resuming_and_gone_when_published(store: Store) -> None:
    folder = store.staging("sft", "abc1")
    assert store.unfinished("sft", "abc1") is None  # nothing done yet
    (folder / "checkpoint").write_text("step 10")
    assert store.staging("sft", "abc1") == folder
    assert store.unfinished("sft", "abc1") == folder
    assert (folder / "checkpoint").read_text() == "step 10"
    store.publish("sft", "abc1", folder, Manifest("sft", "abc1"))
    assert store.unfinished("sft", "abc1") is None
    assert list((store.root / ".staging").iterdir()) == []
    assert list((store.root / ".trash").iterdir()) == []


def test_discard_starts_afresh(store: Store) -> None:
    (store.staging("sft", "abc1") / "checkpoint").write_text("step 10")
    store.discard("sft", "abc1")
    assert list(store.staging("sft", "abc1").iterdir()) == []
    store.discard("sft", "no1")


def test_all_is_sorted_by_creation(store: Store) -> None:
    make(store, "sft", "bbb", created="2026-01-03T00:00:00+00:00")
    make(store, "ppo", "aaa", created="2026-01-02T00:00:00+00:00")
    make(store, "ppo", "ccc", created="2026-01-01T00:00:00+00:00")
    assert [one.key for one in store.all()] == ["ccc", "aaa", "bbb"]


def test_find_and_get_by_prefix(store: Store) -> None:
    for stage, key in (("sft", "ab12"), ("ppo", "ab34"), ("ppo", "cd56")):
        make(store, stage, key)
    assert {one.key for one in store.find("ab")} == {"ab12", "ab34"}
    assert [one.key for one in store.find("ppo/ab")] == ["ab34"]
    assert store.get("c").key == "cd56"
    assert store.get("sft/ab12").key == "ab12"
    with pytest.raises(UserError, match=r"'ab' fits 2 artifacts") as several:
        store.get("ab")
    assert "sft/ab12" in str(several.value)
    assert "ppo/ab34" in str(several.value)
    for nothing in ("x", "sft/cd", "", "/", "eval/ab"):
        with pytest.raises(UserError, match=r"no artifact .*store ls"):
            store.get(nothing)


def test_children(store: Store) -> None:
    make(store, "sft", "aaa")
    make(store, "ppo", "bbb", parents={"sft": "aaa"})
    make(store, "ppo", "ccc", parents={"sft": "ddd"})
    assert [one.key for one in store.children("aaa")] == ["bbb"]


def test_a_lookup_marks_the_artifact_as_used(store: Store) -> None:
    made = make(store, "sft", "aaa")
    os.utime(made.path / MANIFEST, (1, 1))
    store.all()
    store.find("a")
    assert (made.path / MANIFEST).stat().st_mtime == 1
    store.lookup("sft", "aaa")
    assert (made.path / MANIFEST).stat().st_mtime > 1e9


def test_a_damaged_manifest_stops_its_lookup_but_not_the_list(store: Store) -> None:
    make(store, "sft", "aaa")
    bad = make(store, "sft", "bbb")
    (bad.path / MANIFEST).write_text("{")
    (store.root / "sft" / "ccc").mkdir()
    with pytest.raises(UserError, match="not a readable manifest"):
        store.lookup("sft", "bbb")
    assert store.lookup("sft", "ccc") is None
    assert [one.key for one in store.all()] == ["aaa"]
    assert [path.name for path in store.damaged()] == ["bbb", "ccc"]


@pytest.mark.parametrize(
    ("stage", "key"), [("s-ft", "a"), ("../sft", "a"), ("sft", "a/b"), ("sft", ".."), ("sft", "")]
)
def test_names_that_leave_the_store_are_refused(store: Store, stage: str, key: str) -> None:
    with pytest.raises(AssertionError):
        store.staging(stage, key)
    with pytest.raises(AssertionError):
        store.lookup(stage, key)
