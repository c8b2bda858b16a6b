import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store import atomic_files, publish
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.atomic_files import exchange
from rlhf_exp.store.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def work(store: Store, key: str = "abc1") -> Path:
    folder = store.staging("ppo", key)
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_text(f"weights of {key}")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "optimizer.bin").write_text("moments")
    return folder


def published(store: Store, folder: Path, key: str = "abc1", **more: object) -> Artifact:
    manifest = Manifest("ppo", key, metrics={"reward": 2.0})
    return store.publish("ppo", key, folder, manifest, ["checkpoints/*"], **more)  # type: ignore[arg-type]


def test_what_is_dropped_is_gone_and_the_rest_is_in_the_manifest(store: Store) -> None:
    folder = work(store)
    (folder / "deep" / "checkpoints").mkdir(parents=True)
    (folder / "deep" / "checkpoints" / "x").write_text("stays")
    artifact = published(store, folder)
    found = {
        path.relative_to(artifact.path).as_posix()
        for path in artifact.path.rglob("*")
        if path.is_file()
    }
    kept = {"model/weights.bin", "metrics.jsonl", "deep/checkpoints/x"}
    assert found == kept | {MANIFEST}
    assert set(artifact.manifest.files) == kept
    assert not (artifact.path / "checkpoints").exists()
    artifact.verify()


def test_weights_are_as_readable_as_other_files(store: Store) -> None:
    """A store may be shared; safetensors writes files that only their owner can read."""
    folder = work(store)
    (folder / "model" / "weights.bin").chmod(0o600)
    weights = published(store, folder).path / "model" / "weights.bin"
    umask = os.umask(0)
    os.umask(umask)
    assert weights.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("pattern", ["checkpoints", "checkpoints/*", "*/optimizer.bin", "*.bin"])
def test_drop_patterns(store: Store, pattern: str) -> None:
    folder = work(store)
    (folder / "model" / "config.json").write_text("{}")
    artifact = store.publish("ppo", "abc1", folder, Manifest("ppo", "abc1"), [pattern])
    assert not (artifact.path / "checkpoints").exists()
    assert (artifact.path / "model" / "config.json").exists()
    assert (artifact.path / "model" / "weights.bin").exists() == (pattern != "*.bin")


def test_links_are_settled(store: Store, tmp_path: Path) -> None:
    folder = work(store)
    (tmp_path / "blob").write_text("from a cache")
    (folder / "inside").symlink_to("model/weights.bin")
    (folder / "absolute").symlink_to(folder / "model" / "weights.bin")
    (folder / "outside").symlink_to(tmp_path / "blob")
    (folder / "dangling").symlink_to("nowhere/at/all")
    (folder / "folder").symlink_to(tmp_path)
    artifact = published(store, folder)
    assert (artifact.path / "inside").is_symlink()
    for name, text in (("absolute", "weights of abc1"), ("outside", "from a cache")):
        assert not (artifact.path / name).is_symlink()
        assert (artifact.path / name).read_text() == text
        assert name in artifact.manifest.files
    assert not (artifact.path / "folder").exists()
    assert (tmp_path / "blob").exists()


def test_an_existing_target_wins(store: Store, tmp_path: Path) -> None:
    first = published(store, work(store))
    other = work(store)
    (other / "model" / "weights.bin").write_text("other weights")
    assert published(store, other) == first
    assert (first.path / "model" / "weights.bin").read_text() == "weights of abc1"
    assert not other.exists()
    first.verify()


def test_a_redone_artifact_replaces_the_one_it_was_made_for(store: Store) -> None:
    first = published(store, work(store))
    redone = work(store)
    (redone / "model" / "weights.bin").write_text("redone")
    second = published(store, redone, replaces=first)
    assert (second.path / "model" / "weights.bin").read_text() == "redone"
    second.verify()
    # Another process redoes the same, later: the second is not the one it set out to replace.
    third = work(store)
    assert published(store, third, replaces=first) == second


def test_a_target_without_a_manifest_gives_way(store: Store) -> None:
    (store.root / "ppo" / "abc1").mkdir(parents=True)
    (store.root / "ppo" / "abc1" / "junk").write_text("x")
    artifact = published(store, work(store))
    assert not (artifact.path / "junk").exists()
    artifact.verify()


def test_a_failed_check_leaves_staging_to_be_published_by_the_next_run(store: Store) -> None:
    def lost() -> None:
        raise RuntimeError("lease lost")

    folder = work(store)
    with pytest.raises(RuntimeError, match="lease lost"):
        published(store, folder, check=lost)
    assert store.lookup("ppo", "abc1") is None
    assert folder.is_dir()
    artifact = store.publish_pending("ppo", "abc1")
    assert artifact is not None
    assert artifact.manifest.metrics == {"reward": 2.0}
    artifact.verify()


def test_nothing_is_pending_after_success_or_when_work_goes_on(store: Store) -> None:
    assert store.publish_pending("ppo", "abc1") is None
    published(store, work(store))
    assert store.publish_pending("ppo", "abc1") is None

    def lost() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        published(store, work(store, "def2"), "def2", check=lost)
    store.staging("ppo", "def2")  # somebody trains on in this folder
    assert store.publish_pending("ppo", "def2") is None


def test_an_empty_folder_is_not_published(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to publish"):
        published(store, store.staging("ppo", "abc1"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["note", "manifest", "flush"])
def test_a_full_disk_says_what_is_needed_and_keeps_staging(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    real = atomic_files.write_json_atomic

    def write(path: Path, content: object, *, durable: bool = True) -> None:
        if (where == "note") == path.name.endswith(".publish.json") and where != "flush":
            raise OSError(number, os.strerror(number), str(path))
        real(path, content, durable=durable)

    def flush(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    folder = work(store)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "write_json_atomic", write)
        if where == "flush":
            patch.setattr(publish, "sync_tree", flush)
        with pytest.raises(UserError) as error:
            published(store, folder)
    said = str(error.value)
    assert said.startswith("publishing ppo abc1: the disk")
    assert ("quota" in said) == (number == errno.EDQUOT)
    assert " needed, " in said
    assert " free on its file system" in said
    assert "without training again" in said
    assert store.lookup("ppo", "abc1") is None
    assert (folder / "model" / "weights.bin").read_text() == "weights of abc1"
    if where == "note":
        # Nothing had begun: the checkpoint from which the next run continues is untouched.
        assert (folder / "checkpoints" / "step-1" / "optimizer.bin").exists()
        artifact = published(store, folder)
    else:
        pending = store.publish_pending("ppo", "abc1")
        assert pending is not None
        artifact = pending
    artifact.verify()


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(publish, "sync_tree", broken)
    with pytest.raises(OSError, match="input/output error"):
        published(store, work(store))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system (needs root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    store = Store(tiny_disk / "store")
    folder = work(store)
    (tiny_disk / "ballast").write_bytes(b"x" * 150_000)
    manifest = Manifest("ppo", "abc1", git={"diff": "d" * 60_000})
    with pytest.raises(UserError) as error:
        store.publish("ppo", "abc1", folder, manifest, ["checkpoints/*"])
    # The manifest twice (as note and as manifest), each 60 kB and less than 1 kB besides.
    assert re.search(r"12[01] kB needed, \d+ kB free", str(error.value))
    assert store.lookup("ppo", "abc1") is None
    (tiny_disk / "ballast").unlink()
    artifact = store.publish_pending("ppo", "abc1")
    assert artifact is not None
    assert len(artifact.manifest.git["diff"]) == 60_000
    artifact.verify()


def run(script: str, *arguments: str, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_before_every_single_file_operation(tmp_path: Path) -> None:
    """A publication killed at its 1st, 2nd, ... operation ends whole in the next run."""
    said = run("crashes.py", "each", str(tmp_path / "store"))
    # Some tens of operations, and the last round survives them all.
    assert int(said.split()[1]) > 20


def test_killed_while_replacing(tmp_path: Path) -> None:
    assert int(run("crashes.py", "redo", str(tmp_path / "store")).split()[1]) > 20


def test_killed_at_random_moments(tmp_path: Path) -> None:
    said = run("crashes.py", "random", str(tmp_path / "store"), "40")
    assert said.startswith("rounds 40")


@pytest.mark.parametrize("same_folder", ["same", "own"])
def test_several_processes_publish_one_key(tmp_path: Path, same_folder: str) -> None:
    assert run("crashes.py", "race", str(tmp_path / "store"), same_folder) == "rounds 15\n"


def test_a_replaced_artifact_is_never_missing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old or new: whoever looks while a redone artifact takes its place finds one of the two."""
    old = published(store, work(store))
    seen = []
    real = publish.delete

    def looking(root: Path, path: Path) -> None:
        seen.append(store.lookup("ppo", "abc1"))
        real(root, path)
        seen.append(store.lookup("ppo", "abc1"))

    monkeypatch.setattr(publish, "delete", looking)
    new = published(store, work(store), replaces=old)
    assert {None if one is None else one.manifest.created for one in seen} == {new.manifest.created}
    assert store.unfinished("ppo", "abc1") is None
    # A file system that cannot swap two names, such as NFS, has a moment without.
    monkeypatch.setattr(publish, "exchange", lambda first, second: False)
    newer = published(store, work(store), replaces=new)
    assert seen[-1] is not None
    assert store.lookup("ppo", "abc1") == newer
    assert None in seen


def test_exchange(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "one").touch()
    (second / "two").touch()
    assert exchange(first, second)
    assert [path.name for path in (*first.iterdir(), *second.iterdir())] == ["two", "one"]
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "none")
    assert [path.name for path in first.iterdir()] == ["two"]
