"""Publications that are killed or compete, each in a fork of this small process.

    python tests/store/crashes.py each|redo|random|race STORE [ROUNDS|same|own]

Started by test_publish.py: forking the test process itself would copy its threads' locks.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from rlhf_exp.store.artifact import Artifact, Manifest
from rlhf_exp.store.store import Store

CONTENT = {"model/weights.bin": "w" * 5000, "metrics.jsonl": "{}\n", "config.json": "{}"}
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}


def fill(folder: Path, key: str) -> None:
    for name, text in {**CONTENT, "checkpoints/1/state.bin": "state"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + key)


def publish(store: Store, key: str, folder: Path) -> Artifact:
    manifest = Manifest("ppo", key, metrics={"reward": 1.0})
    return store.publish("ppo", key, folder, manifest, ["checkpoints/*"])


def check_store(store: Store) -> None:
    """No artifact is broken, and none is there without its manifest."""
    assert store.damaged() == [], store.damaged()
    for artifact in store.all():
        artifact.verify()
        assert set(artifact.manifest.files) == set(CONTENT), artifact.manifest.files


def finish(store: Store, key: str) -> str:
    """Do what the next run does; the artifact must come out whole without any new work."""
    check_store(store)
    if store.lookup("ppo", key) is not None:
        how = "published"
    elif store.publish_pending("ppo", key) is not None:
        how = "pending"
    else:
        folder = store.unfinished("ppo", key)
        assert folder is not None
        assert (folder / "checkpoints/1/state.bin").read_text() == f"state{key}"
        publish(store, key, folder)
        how = "untouched"
    artifact = store.lookup("ppo", key)
    assert artifact is not None
    for name, text in CONTENT.items():
        assert (artifact.path / name).read_text() == text + key
    check_store(store)
    return how


def kill_at(operation: int) -> None:
    """Kill this process when it is about to do its n-th operation on a file."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def each(store: Store) -> None:
    ways: set[str] = set()
    operation = 0
    while True:
        operation += 1
        key = f"key{operation}"
        folder = store.staging("ppo", key)
        fill(folder, key)
        child = os.fork()
        if child == 0:
            kill_at(operation)
            publish(store, key, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        ways.add(finish(store, key))
        if not os.WIFSIGNALED(status):
            break
    assert ways == {"untouched", "pending", "published"}, ways
    store.gc([], grace_s=0)
    assert store.all() == []
    assert not any((store.root / ".trash").iterdir())
    assert not any((store.root / ".staging").iterdir())
    print("operations", operation)


def redo(store: Store) -> None:
    """At each moment of a publication that replaces an artifact there is the old one or the new."""
    operation, seen = 0, set()
    while True:
        operation += 1
        key = f"key{operation}"
        fill(store.staging("ppo", key), key)
        old = publish(store, key, store.staging("ppo", key))
        folder = store.staging("ppo", key)
        fill(folder, f"{key} anew")
        child = os.fork()
        if child == 0:
            kill_at(operation)
            store.publish("ppo", key, folder, Manifest("ppo", key), ["checkpoints/*"], replaces=old)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check_store(store)
        found = store.lookup("ppo", key)
        assert found is not None, f"nothing is there after {operation - 1} operations"
        seen.add("old" if found.manifest == old.manifest else "new")
        if store.publish_pending("ppo", key) is None and found.manifest == old.manifest:
            store.publish("ppo", key, folder, Manifest("ppo", key), ["checkpoints/*"], replaces=old)
        check_store(store)
        weights = old.path / "model/weights.bin"
        assert weights.read_text() == f"{CONTENT['model/weights.bin']}{key} anew"
        assert store.unfinished("ppo", key) is None
        if not os.WIFSIGNALED(status):
            break
    assert seen == {"old", "new"}
    print("operations", operation)


def random_moments(store: Store, rounds: int) -> None:
    number = random.Random(0)
    ways: dict[str, int] = {}
    for turn in range(rounds):
        child = os.fork()
        if child == 0:
            for item in range(1000):
                key = f"t{turn}i{item}"
                fill(store.staging("ppo", key), key)
                (store.root / f"ready-{key}").touch()
                publish(store, key, store.staging("ppo", key))
            os._exit(0)
        while not any(store.root.glob("ready-*")):
            time.sleep(0.001)
        time.sleep(0.06 * number.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_store(store)
        for ready in store.root.glob("ready-*"):
            how = finish(store, ready.name.removeprefix("ready-"))
            ways[how] = ways.get(how, 0) + 1
            ready.unlink()
        store.gc([], grace_s=0)
    assert sum(ways.values()) >= rounds, ways
    assert ways.get("pending", 0) > 0, ways
    print("rounds", rounds, ways)


def race(store: Store, same: bool) -> None:
    rounds, processes = 15, 3
    for turn in range(rounds):
        key = f"key{turn}"
        folders = [store.root / f"work-{turn}-{index}" for index in range(processes)]
        if same:
            folders = [store.staging("ppo", key)] * processes
        for folder in folders:
            fill(folder, key)
        start = time.monotonic() + 0.05
        children = []
        for folder in folders:
            child = os.fork()
            if child == 0:
                time.sleep(max(0.0, start - time.monotonic()))
                publish(store, key, folder).verify()
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
        check_store(store)
        assert store.lookup("ppo", key) is not None
        assert not any(folder.exists() for folder in folders)
    print("rounds", rounds)


if __name__ == "__main__":
    what, place = Store(Path(sys.argv[2])), sys.argv[1]
    if place == "each":
        each(what)
    elif place == "redo":
        redo(what)
    elif place == "random":
        random_moments(what, int(sys.argv[3]))
    else:
        race(what, sys.argv[3] == "same")
