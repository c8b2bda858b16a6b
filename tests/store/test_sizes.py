from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.records import Records, RunRecord, Status
from rlhf_exp.store.sizes import size_of, sizes, users
from rlhf_exp.store.store import Store


def make(store: Store, stage: str, key: str, size: int, wandb: int = 0, **parents: str) -> Artifact:
    folder = store.staging(stage, key)
    (folder / "model.bin").write_bytes(b"x" * size)
    (folder / "wandb").mkdir()
    (folder / "wandb" / "run.wandb").write_bytes(b"x" * wandb)
    return store.publish(stage, key, folder, Manifest(stage, key, parents=parents))


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Store, Records]:
    """A shared SFT model; a sweep of two points, one unfinished; another run with a point."""
    store, records = Store(tmp_path / "store"), Records(tmp_path / "sweeps")
    make(store, "sft", "s1", 1000, wandb=10)
    make(store, "ppo", "p1", 200, wandb=3, sft="s1")
    make(store, "ppo", "p3", 50, sft="s1")
    (store.staging("ppo", "p2") / "wandb").mkdir()
    (store.staging("ppo", "p2") / "checkpoint").write_bytes(b"x" * 7)
    (store.staging("ppo", "p2") / "wandb" / "run.wandb").write_bytes(b"x" * 4)
    records.write(RunRecord("kl", "ppo", {"sft": "s1", "ppo": "p1"}))
    records.write(RunRecord("kl", "ppo", {"sft": "s1", "ppo": "p2"}, status=Status.interrupted))
    # Its SFT model was given by its key: the record does not name it, the manifest does.
    records.write(RunRecord("other", "ppo", {"ppo": "p3"}))
    return store, records


def manifest_size(store: Store, *names: str) -> int:
    return sum((store.root / name / MANIFEST).stat().st_size for name in names)


def test_what_is_shared_is_told_apart(outputs: tuple[Store, Records]) -> None:
    store, records = outputs
    before = (store.root / "sft" / "s1" / MANIFEST).stat().st_mtime_ns
    found = size_of(store, records, "kl")
    assert found.points == 2
    assert found.own == 203 + manifest_size(store, "ppo/p1")
    assert found.shared == 1010 + manifest_size(store, "sft/s1")
    assert found.unfinished == 11
    assert found.tracked == 10 + 3 + 4
    logs = sum(path.stat().st_size for path in (records.root / "kl").iterdir())
    assert found.logs == logs
    assert found.total == found.own + found.shared + 11 + logs
    assert (store.root / "sft" / "s1" / MANIFEST).stat().st_mtime_ns == before
    assert str(found).endswith("records and logs (17 B of it W&B's)")


def test_all_names(outputs: tuple[Store, Records]) -> None:
    store, records = outputs
    assert [one.name for one in sizes(store, records)] == ["kl", "other"]
    other = size_of(store, records, "other")
    assert (other.points, other.unfinished, other.tracked) == (1, 0, 10)
    assert other.own == 50 + manifest_size(store, "ppo/p3")
    # Alone, a name shares nothing.
    for path in (records.root / "kl").iterdir():
        path.unlink()
    assert size_of(store, records, "other").shared == 0
    assert users(records) == {"p3": ["other"]}
    gone = size_of(store, records, "kl")
    assert (gone.points, gone.total) == (0, 0)
