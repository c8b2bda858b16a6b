import errno
import os
import time
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store import gc
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.lease import hold
from rlhf_exp.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, stage: str, key: str, **parents: str) -> Artifact:
    folder = store.staging(stage, key)
    (folder / "model.bin").write_text("0123456789")
    return store.publish(stage, key, folder, Manifest(stage, key, parents=parents))


def chain(store: Store, end: str) -> list[Artifact]:
    """Return SFT, reward model and PPO run, each made from those before."""
    sft = make(store, "sft", f"s{end}")
    reward = make(store, "reward", f"r{end}", sft=sft.key)
    return [sft, reward, make(store, "ppo", f"p{end}", sft=sft.key, reward=reward.key)]


def keys(store: Store) -> set[str]:
    return {one.key for one in store.all()}


def aged(path: Path, age_s: float) -> None:
    for found in [*path.rglob("*"), path]:
        os.utime(found, (time.time() - age_s, time.time() - age_s))


def test_a_dry_run_names_what_a_real_one_deletes(store: Store) -> None:
    chain(store, "1")
    chain(store, "2")
    dry = store.gc(["p1"], dry_run=True, grace_s=0)
    assert {one.path.name for one in dry} == {"s2", "r2", "p2"}
    assert keys(store) == {"s1", "r1", "p1", "s2", "r2", "p2"}
    real = store.gc(["p1"], grace_s=0)
    assert [(one.path, one.reason) for one in real] == [(one.path, one.reason) for one in dry]
    assert all(one.bytes > 10 for one in real)  # 10 bytes of weights and the manifest
    assert keys(store) == {"s1", "r1", "p1"}
    assert store.gc(["p1"], grace_s=0) == []


def test_ancestors_of_what_is_kept_are_kept(store: Store) -> None:
    chain(store, "1")
    make(store, "eval", "e1", ppo="p1")
    store.gc(["e1"], grace_s=0)
    assert keys(store) == {"s1", "r1", "p1", "e1"}
    store.gc(["r1"], grace_s=0)
    assert keys(store) == {"s1", "r1"}


def test_a_parent_that_is_gone_does_no_harm(store: Store) -> None:
    chain(store, "1")
    store.remove(store.get("r1"))
    store.gc(["p1"], grace_s=0)
    assert keys(store) == {"s1", "p1"}


def test_what_was_used_lately_is_kept_and_so_is_what_it_needs(store: Store) -> None:
    chain(store, "1")
    for one in store.all():
        aged(one.path, 7200)
    store.lookup("reward", "r1")
    assert {one.path.name for one in store.gc([])} == {"p1"}
    assert keys(store) == {"s1", "r1"}


def test_what_a_live_lease_holds_or_reads_is_kept(store: Store) -> None:
    chain(store, "1")
    staging = store.staging("ppo", "p2")
    (staging / "checkpoint").write_text("step 10")
    with hold(store.root, "ppo", "p2", parents=["r1"]):
        assert {one.path.name for one in store.gc([], grace_s=0)} == {"p1"}
    assert keys(store) == {"s1", "r1"}  # r1 by the lease, s1 as its parent
    assert staging.is_dir()
    gone = store.gc([], grace_s=0)
    assert {one.path.name for one in gone} == {"s1", "r1", "ppo-p2"}
    assert not staging.exists()


def test_a_lease_taken_after_the_choice_still_protects(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, "sft", "s1")
    with hold(store.root, "sft", "s1"):
        monkeypatch.setattr(gc, "holders", lambda root: [])
        assert store.gc([], grace_s=0) == []
    assert keys(store) == {"s1"}


def test_a_use_after_the_choice_still_protects(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(store, "sft", "s1")
    aged(made.path, 7200)
    real = gc.try_hold

    def looked_up_meanwhile(*arguments: str) -> object:
        store.lookup("sft", "s1")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gc, "try_hold", looked_up_meanwhile)
    assert store.gc([]) == []
    assert keys(store) == {"s1"}


def test_unfinished_work_of_a_recorded_run_is_kept(store: Store) -> None:
    for key in ("p1", "p2"):
        (store.staging("ppo", key) / "checkpoint").write_text("step 10")
        aged(store.staging("ppo", key), 7200)
    (store.staging("ppo", "p3") / "checkpoint").write_text("just begun")
    assert {one.path.name for one in store.gc(["p1"])} == {"ppo-p2"}
    assert store.unfinished("ppo", "p1")
    assert store.unfinished("ppo", "p3")


def test_leftovers_go(store: Store) -> None:
    made = make(store, "sft", "s1")
    (store.staging("sft", "s1") / "checkpoint").write_text("of the slower process")
    (store.root / ".trash").mkdir(exist_ok=True)
    (store.root / ".trash" / "half").mkdir()
    (store.root / ".trash" / "half" / "model.bin").write_text("x")
    (store.root / ".staging" / ".x.1.draft").write_text("half")
    damaged = make(store, "sft", "s2").path
    (damaged / MANIFEST).unlink()
    precious = make(store, "sft", "s3").path
    (precious / MANIFEST).write_text("{")
    reasons = {one.path.name: one.reason for one in store.gc(["s1", "s3"], grace_s=0)}
    assert reasons == {
        "sft-s1": "left over: it is published",
        "half": "half deleted",
        "s2": "has no readable manifest",
        ".x.1.draft": "half written",
    }
    assert made.path.exists()
    assert not damaged.exists()
    assert precious.exists()  # a run refers to it: people decide


def test_drafts_of_every_kind_go_and_those_of_others_stay(store: Store) -> None:
    outputs = store.root.parent
    drafts = [
        outputs / "sweeps" / "lr" / ".ab12.json.31500.4f055761.draft",
        outputs / "cache" / "tokenized" / ".0123.77.00ff00ff.draft" / "flat.npy",
        outputs / "reports" / ".eval-1.html.7.0a0b0c0d.draft",
        outputs / ".pins.json.12.12345678.draft",
        store.staging("ppo", "p1") / "model" / ".tmpAb3xYz",
    ]
    others = [
        outputs / "sweeps" / "lr" / "ab12.json",
        outputs / ".git" / ".x.1.00000000.draft",
        outputs / ".tmpAb3xYz",
        outputs / "letter.draft",
    ]
    for path in [*drafts, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    assert store.gc(["p1"]) == []  # a writer may be at work
    aged(outputs, 7200)
    removed = {one.path: one.reason for one in store.gc(["p1"])}
    expected = [path.parent if path.name == "flat.npy" else path for path in drafts]
    assert removed == dict.fromkeys(expected, "half written")
    assert not any(map(os.path.lexists, drafts))
    assert all(path.read_text() == "half" for path in others)
    assert store.gc(["p1"]) == []


def test_the_files_of_dead_leases_go(store: Store) -> None:
    folder = store.root / ".leases"
    folder.mkdir(parents=True)
    (folder / "sft-s1.lease").write_text(
        "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=t\nduration=30.0\n"
    )
    (folder / "sft-s1.json").write_text("{}")
    (folder / "sft-s1.lease.break.7.00").write_text("filelock/break\n7\n")
    aged(folder, 300)
    assert store.gc([], grace_s=0) == []
    aged(folder, 900)
    assert [one.path.name for one in store.gc([], grace_s=0)] == ["sft-s1.lease"]
    assert list(folder.iterdir()) == []


def test_collection_works_on_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, "sft", "s1")
    make(store, "sft", "s2")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with hold(store.root, "sft", "s2"):
        monkeypatch.setattr(gc, "try_hold", full)
        assert {one.path.name for one in store.gc([], grace_s=0)} == {"s1"}
    assert keys(store) == {"s2"}


def test_remove(store: Store) -> None:
    made = make(store, "sft", "s1")
    assert store.remove(made, dry_run=True).path == made.path
    assert keys(store) == {"s1"}
    assert store.remove(made).bytes > 10
    assert keys(store) == set()
    assert list((store.root / ".trash").iterdir()) == []


def test_what_is_in_use_is_not_removed(store: Store) -> None:
    made = make(store, "sft", "s1")
    for key, parents in (("s1", []), ("p1", ["s1"])):
        stage = "sft" if key == "s1" else "ppo"
        with hold(store.root, stage, key, parents=parents):
            with pytest.raises(UserError, match=rf"sft/s1 is in use: process {os.getpid()} "):
                store.remove(made)
            assert keys(store) == {"s1"}
