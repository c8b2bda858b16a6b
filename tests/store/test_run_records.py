from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Manifest
from rlhf_exp.store.disk_usage import kept_keys
from rlhf_exp.store.run_records import Process, Records, RunRecord, Status
from rlhf_exp.store.store import Store

PROGRAM = (
    "import json, dataclasses; from rlhf_exp.store.run_records import Process\n"
    "print(json.dumps(dataclasses.asdict(Process.current())), flush=True); input()"
)


def test_a_process_is_gone_when_it_is_killed() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    found = Process(**json.loads(child.stdout.readline()))
    assert found.pid == child.pid
    assert not found.gone
    child.kill()
    deadline = time.monotonic() + 30
    while not found.gone and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found.gone, "even before its parent has asked for its exit code"
    child.communicate()
    assert found.gone


def test_another_process_with_the_same_number_is_another_one() -> None:
    own = Process.current()
    assert not own.gone
    assert replace(own, started="1").gone


def test_of_other_machines_nothing_is_known() -> None:
    own = Process.current()
    assert not replace(own, host="elsewhere", started="1").gone
    assert not replace(own, namespace="other", started="1").gone


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "sweeps")


def record(name: str, key: str, day: int, **more: object) -> RunRecord:
    keys = {"sft": "5f01", "reward": "4e02", "ppo": key}
    created = f"2026-01-{day:02d}T00:00:00+00:00"
    return RunRecord(name, "ppo", keys, created=created, **more)  # type: ignore[arg-type]


@pytest.fixture
def some(records: Records) -> dict[str, RunRecord]:
    made = {
        "single": record("baseline", "ab12", 1, overrides=("ppo.lr=1",), seed=3, objective=0.5),
        "first": record("kl", "cd34", 2, overrides=("ppo.lr=1",)),
        "second": record("kl", "ce56", 3, status=Status.failed, error="boom"),
    }
    for one in made.values():
        records.write(one)
    return made


def test_written_and_read(records: Records, some: dict[str, RunRecord]) -> None:
    assert (records.root / "baseline" / "ab12.json").is_file()
    assert records.all() == [some["single"], some["first"], some["second"]]
    assert records.sweep("kl") == [some["first"], some["second"]]
    assert records.names() == ["baseline", "kl"]
    assert kept_keys(records) == {"5f01", "4e02", "ab12", "cd34", "ce56"}
    plain = json.loads((records.root / "kl" / "ce56.json").read_text())
    assert (plain["status"], plain["error"]) == ("failed", "boom")


def test_the_same_point_again_replaces_its_record(records: Records) -> None:
    records.write(record("kl", "cd34", 1, status=Status.failed))
    records.write(record("kl", "cd34", 2))
    assert [one.status for one in records.all()] == [Status.done]


def test_resolve(records: Records, some: dict[str, RunRecord]) -> None:
    assert records.resolve("latest") == some["second"]
    assert records.resolve("baseline") == some["single"]
    assert records.resolve("kl/cd") == some["first"]
    assert records.resolve("ab") == some["single"]
    assert records.resolve("ce56") == some["second"]
    assert records.resolve(str(records.root / "baseline")) == some["single"]


def test_a_sweep_copied_elsewhere_is_read_by_its_folder(
    records: Records, some: dict[str, RunRecord], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(records.root / "kl", copy)
    (copy / "notes.json").write_text("[]")
    assert records.resolve_all(str(copy)) == [some["first"], some["second"]]


def test_resolve_all_gives_a_sweeps_points(records: Records, some: dict[str, RunRecord]) -> None:
    points = [some["first"], some["second"]]
    assert records.resolve_all("kl") == points
    assert records.resolve_all("latest") == points
    assert records.resolve_all(str(records.root / "kl")) == points
    assert records.resolve_all("c") == points


def test_several_runs_are_listed(records: Records, some: dict[str, RunRecord]) -> None:
    for ambiguous in ("kl", "c"):
        with pytest.raises(UserError, match=rf"'{ambiguous}' fits 2 runs") as error:
            records.resolve(ambiguous)
        assert "kl/cd34  ppo.lr=1\n" in str(error.value)
        assert str(error.value).endswith("kl/ce56")


def test_unknown_names_list_near_ones(records: Records, some: dict[str, RunRecord]) -> None:
    with pytest.raises(UserError, match=r"no run 'basline' .*names near it: baseline$"):
        records.resolve("basline")
    for unknown in ("", "/", "..", "kl/zz", "-x", "a b"):
        with pytest.raises(UserError, match=r"expected `latest`, a name"):
            records.resolve(unknown)


def test_nothing_recorded(records: Records) -> None:
    for run in ("latest", "kl"):
        with pytest.raises(UserError, match="no run is recorded yet"):
            records.resolve(run)


def test_artifacts_without_a_record(tmp_path: Path, records: Records) -> None:
    store = Store(tmp_path / "store")
    folder = store.staging("ppo", "f00d")
    (folder / "model.bin").write_text("x")
    manifest = Manifest("ppo", "f00d", parents={"sft": "5f01"}, objective=0.25)
    artifact = store.publish("ppo", "f00d", folder, manifest)
    for run in ("f0", "ppo/f0", str(artifact.path)):
        found = records.resolve(run, store)
        assert found.key == "f00d"
        assert found.keys == {"sft": "5f01", "ppo": "f00d"}
        assert found.objective == 0.25
    with pytest.raises(UserError, match="no run 'f0'"):
        records.resolve("f0")
    known = RunRecord("mine", "ppo", {"sft": "5f01", "ppo": "f00d"})
    records.write(known)
    assert records.resolve(str(artifact.path), store) == known


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "latest", "x" * 101, "-m"])
def test_names_that_are_no_folder_names_are_refused(records: Records, name: str) -> None:
    with pytest.raises(UserError, match="not usable as a name"):
        records.write(record(name, "ab12", 1))
    assert not records.root.exists()


def test_a_torn_record_names_the_file(records: Records, some: dict[str, RunRecord]) -> None:
    (records.root / "kl" / "cd34.json").write_text('{"name": "kl"')
    with pytest.raises(UserError, match=r"cd34\.json: not a readable run record"):
        records.all()
