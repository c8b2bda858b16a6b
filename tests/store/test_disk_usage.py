from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.disk_usage import RetentionRule, kept_keys, seconds_of, size_of, sizes, users
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store


def point(key: str, objective: float | None, status: Status = Status.done) -> RunRecord:
    """Return a point begun at the second that its key ends with."""
    keys = {"sft": "shared", "ppo": key}
    created = f"2026-01-01T00:00:0{key[-1]}.000+00:00"
    return RunRecord(
        "kl", "ppo", keys, objective=objective, status=status, created=created, error=None
    )


POINTS = [
    point("a1", 0.5),
    point("b2", 0.9),
    point("c3", float("nan")),
    point("d4", None),
    point("e5", 2.0, Status.failed),
    point("f6", 3.0, Status.pruned),
    point("g7", -1.0),
    point("h8", None, Status.running),
    point("i9", 0.1, Status.interrupted),
    point("j0", None, Status.requeued),
]


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        # 0.9 and 0.5 are the highest of those that are done; what has not ended stays.
        ("best:2", "a1 b2 h8 i9 j0"),
        ("best:0", "h8 i9 j0"),
        ("best:9", "a1 b2 g7 h8 i9 j0"),
        # The ended ones were begun at 1 to 7.
        ("last:2", "f6 g7 h8 i9 j0"),
        ("last:99", "a1 b2 c3 d4 e5 f6 g7 h8 i9 j0"),
    ],
)
def test_which_runs_stay(rule: str, stays: str) -> None:
    gone = {one.key for one in RetentionRule.parse("kl", rule).forgets(POINTS)}
    assert {one.key for one in POINTS} - gone == set(stays.split())


def test_other_names_keep_what_they_share(tmp_path: object) -> None:
    records = Records(tmp_path)  # type: ignore[arg-type]
    for one in POINTS:
        records.write(one)
    records.write(RunRecord("other", "ppo", {"sft": "shared", "ppo": "b2"}))
    assert kept_keys(records, RetentionRule.parse("kl", "best:0")) == {
        "shared",
        "b2",
        "h8",
        "i9",
        "j0",
    }
    assert kept_keys(records) == {"shared", *(one.key for one in POINTS)}
    with pytest.raises(UserError, match="near it: kl"):
        kept_keys(records, RetentionRule.parse("k", "best:0"))


@pytest.mark.parametrize("text", ["best", "best:", "best:-1", "best:x", "worst:1", "last:1.5", ""])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UserError, match=r"expected best:N or last:N"):
        RetentionRule.parse("kl", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1.5h", 5400),
        ("7d", 604800),
        ("2w", 1209600),
    ],
)
def test_spans(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "7 days", "-1d", "1y"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(UserError, match="expected a span"):
        seconds_of(text)


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
