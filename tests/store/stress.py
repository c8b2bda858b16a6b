"""Processes that publish, look up, read and collect garbage in one store, and die at any moment.

    python tests/store/stress.py FOLDER ROUNDS [SEED]

Workers make what `pipeline.run` makes, in its order: record, lease, pending publication, lookup,
staging, publication, record. A round kills some of them, starts others in their place, in the end
kills all of them, and then looks at what they have left. The store goes on from round to round.
Forked from this small process: forking the tests' own would copy its threads' locks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rlhf_exp.commands.store import list_artifacts
from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import Artifact, Manifest
from rlhf_exp.store.disk_usage import kept_keys
from rlhf_exp.store.lease import hold, try_hold
from rlhf_exp.store.run_records import Records, RunRecord, Status
from rlhf_exp.store.store import Store

WORKERS = 4
GRACE_S = 0.4
"""What `gc` is told to spare; an hour in earnest."""

# Points p* have records; nothing refers to the others, which may go when nobody uses them.
PARENTS: dict[str, tuple[str, ...]] = {
    "s0": (),
    "s1": (),
    "t0": (),
    "t1": (),
    **{f"p{number}": (f"s{number % 2}",) for number in range(8)},
    **{f"u{number}": (f"t{number % 2}",) for number in range(8)},
}
KEYS = tuple(PARENTS)


def stage_of(key: str) -> str:
    return "ppo" if PARENTS[key] else "sft"


class Worker:
    """What one process does until it is killed.

    Args:
        folder: Where the store, the records and the workers' log are.
        seed: Of what is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.store, self.records = Store(folder / "store"), Records(folder / "sweeps")
        self.random = random.Random(seed)
        self.log = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, what: str, **more: object) -> None:
        os.write(self.log, (json.dumps({"what": what, **more}) + "\n").encode())

    def run(self) -> None:
        actions = (self.make, self.make, self.make, self.read, self.read, self.collect, self.look)
        while True:
            self.random.choice(actions)()

    def make(self) -> None:
        key = self.random.choice(KEYS)
        recorded = key.startswith("p")
        record = RunRecord("kept", "ppo", {}, status=Status.running)
        if recorded:
            keys = {"sft": PARENTS[key][0], "ppo": key}
            record = replace(record, keys=keys)
            self.records.write(record)
        for parent in PARENTS[key]:
            self.bring_up(parent, redo=False)
        self.bring_up(key, redo=self.random.random() < 0.2)
        if recorded:
            self.records.write(replace(record, status=Status.done))

    def bring_up(self, key: str, redo: bool) -> None:
        """Make a result unless it is there; redone, it replaces the one that was found."""
        stage = stage_of(key)
        found = self.store.lookup(stage, key)
        if found is not None and not redo:
            return
        with hold(self.store.root, stage, key, parents=PARENTS[key]) as lease:
            made = self.store.publish_pending(stage, key, check=lease.check)
            made = made or self.store.lookup(stage, key)
            created = None if found is None else found.manifest.created
            if made is not None and made.manifest.created != created:
                self.say("published", key=key)
                return
            folder = self.work(key)
            manifest = Manifest(stage, key, parents=dict(zip(["sft"], PARENTS[key], strict=False)))
            self.store.publish(
                stage, key, folder, manifest, ["checkpoints/*"], check=lease.check, replaces=found
            )
            self.say("published", key=key)

    def work(self, key: str) -> Path:
        """Fill the staging folder; what the work reads must stay for as long as it lasts."""
        folder = self.store.staging(stage_of(key), key)
        for name in ("checkpoints/1/state", "model/weights", "model/config", "metrics.jsonl"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.random.randbytes(3000))
            time.sleep(self.random.random() * 0.004)
        for parent in PARENTS[key]:
            self.intact(parent, "a parent in use")
        return folder

    def read(self) -> None:
        self.intact(self.random.choice(KEYS), "a result just looked up", missing=True)

    def intact(self, key: str, what: str, missing: bool = False) -> None:
        """Read a result that was just looked up: it must be whole, unless another replaced it."""
        found = self.store.lookup(stage_of(key), key)
        if found is None:
            if not missing:
                self.say("bad", why=f"{what} is gone: {key}")
            return
        began = time.monotonic()
        try:
            found.verify()
        except (OSError, UserError) as error:
            slow = time.monotonic() - began > GRACE_S / 2
            now = self.store.lookup(stage_of(key), key)
            if not slow and (now is None or now.manifest.created == found.manifest.created):
                self.say("bad", why=f"{what} is not whole: {error}")
        else:
            self.say("read", key=key)

    def collect(self) -> None:
        removals = self.store.gc(kept_keys(self.records), grace_s=GRACE_S)
        self.say("collected", removed=len(removals))

    def look(self) -> None:
        list_artifacts(self.store)
        self.say("listed")


class Round:
    """Starts workers, kills them, and looks at what is left.

    Args:
        folder: As for `Worker`.
        seed: Of what is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.store, self.records = Store(folder / "store"), Records(folder / "sweeps")
        self.random = random.Random(seed)
        self.started = 0

    def run(self) -> Counter[str]:
        """Return how often what was done; every problem is an assertion."""
        (self.folder / "log.jsonl").unlink(missing_ok=True)
        workers = [self.start() for _ in range(WORKERS)]
        counts: Counter[str] = Counter()
        for _ in range(self.random.randint(4, 12)):
            time.sleep(self.random.uniform(0.005, 0.2))
            aimed = self.random.random() < 0.5
            victim = self.publisher(workers) if aimed else self.random.randrange(WORKERS)
            self.kill(workers[victim])
            workers[victim] = self.start()
            counts["kills"] += 1
        for worker in workers:
            self.kill(worker)
        counts["kills"] += WORKERS
        published: set[str] = set()
        for line in (self.folder / "log.jsonl").read_text().splitlines():
            said = json.loads(line)
            assert said["what"] != "bad", said
            counts[said["what"]] += 1
            counts["removed"] += said.get("removed", 0)
            if said["what"] == "published":
                published.add(said["key"])
        self.check(published)
        return counts

    def start(self) -> int:
        self.started += 1
        child = os.fork()
        if child == 0:
            worker = Worker(self.folder, self.seed * 1000 + self.started)
            try:
                worker.run()
            except BaseException:
                worker.say("bad", why=f"a worker failed: {traceback.format_exc()}")
            os._exit(1)
        return child

    def publisher(self, workers: list[int]) -> int:
        """Wait for a worker that publishes, which takes few milliseconds, and some of these."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            for note in (self.store.root / ".staging").glob("*.publish.json"):
                work = note.name.removesuffix(".publish.json")
                with suppress(OSError, ValueError):
                    lease = self.store.root / ".leases" / f"{work}.json"
                    found = workers.index(json.loads(lease.read_text())["pid"])
                    time.sleep(self.random.uniform(0.0, 0.01))
                    return found
        return self.random.randrange(WORKERS)

    def kill(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)

    def check(self, published: set[str]) -> None:
        """Nothing broken, nothing lost, nobody locked out, nothing left over."""
        self.check_whole()
        kept = kept_keys(self.records)
        there = {one.key for one in self.store.all()}
        lost = published & kept - there
        assert not lost, f"published, referred to, and gone: {lost}"
        for key in KEYS:
            self.check_lease(key)
        # As if ten minutes had passed, after which what a lease left behind may go.
        for path in (self.store.root / ".leases").iterdir():
            os.utime(path, (time.time() - 700, time.time() - 700))
        self.store.gc(kept, grace_s=0)
        self.check_whole()
        assert not there & kept - {one.key for one in self.store.all()}, "gc took what is kept"
        unfinished = {path.name for path in (self.store.root / ".staging").iterdir()}
        known = {f"{stage_of(key)}-{key}" for key in kept}
        leaked = {name for name in unfinished if name.removesuffix(".publish.json") not in known}
        assert not leaked, f"left over: {leaked}"
        for folder in (".trash", ".leases"):
            with suppress(FileNotFoundError):
                left = [path.name for path in (self.store.root / folder).iterdir()]
                assert not left, f"left over in {folder}: {left}"

    def check_lease(self, key: str) -> None:
        """The next one gets it: at once, or after two seconds if the dead had not yet signed."""
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            with try_hold(self.store.root, stage_of(key), key) as lease:
                if lease is not None:
                    return
            time.sleep(0.2)
        raise AssertionError(f"a dead process keeps the lease on {key}")

    def check_whole(self) -> None:
        assert self.store.damaged() == [], self.store.damaged()
        for artifact in self.store.all():
            self.check_artifact(artifact)

    def check_artifact(self, artifact: Artifact) -> None:
        artifact.verify()
        names = {"model/weights", "model/config", "metrics.jsonl"}
        assert set(artifact.manifest.files) == names, artifact.manifest.files
        found = {path for path in artifact.path.rglob("*") if path.is_file()}
        assert len(found) == len(names) + 1, found


def main(folder: Path, rounds: int, seed: int) -> None:
    began, counts = time.monotonic(), Counter[str]()
    for number in range(rounds):
        counts += Round(folder, seed + number).run()
    took = time.monotonic() - began
    print(f"{rounds} rounds, {took:.0f} s:", json.dumps(dict(sorted(counts.items()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)
