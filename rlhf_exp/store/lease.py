"""Leases: the right to make an artifact, so that others wait for it instead of making it too.

A lease does not fence: a holder that was suspended keeps running after somebody else took over. So
`Lease.check` reads the claim again from disk; call it before every checkpoint and every rename. The
store survives an overlap all the same, because a published target wins.

Each lease is two files in `<store>/.leases`: `<stage>-<key>.lease`, filelock's marker whose time
a heartbeat refreshes, and `<stage>-<key>.json`, which says for people and for garbage collection
who holds it, since when, and which parents the work needs.

`holders` reads these files without taking a lease.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from rlhf_exp.errors import UserError
from rlhf_exp.store.artifact import now
from rlhf_exp.store.atomic_files import disk_full_is_user_error, draft_of, write_json_atomic

DURATION_S = 30.0
POLL_S = 0.2
NOTE_BYTES = 8192
# A peer that judges a claim stale swaps the marker aside for some system calls, and a network file
# system may stumble: the loss of a lease is believed when it lasts.
LOOKS, LOOK_S = 5, 0.1


class LeaseLost(RuntimeError):
    """Somebody else holds the lease now: stop writing."""


@dataclass(frozen=True)
class Claim:
    """A lease as seen by a process that works under it; plain values, which cross processes.

    Attributes:
        marker: the lease's file.
        stage: the stage being made.
        key: its key.
        token: names the claim.
    """

    marker: str
    stage: str
    key: str
    token: str

    def check(self) -> None:
        """Return if the lease is still this claim's on disk.

        Raises:
            LeaseLost: it is not; the message says who holds it.
        """
        for _ in range(LOOKS):
            owner = SoftFileLease(self.marker).owner
            if owner is not None and owner.token == self.token:
                return
            time.sleep(LOOK_S)
        self.lost()

    def lost(self) -> NoReturn:
        """Say that the lease is lost, and who holds it."""
        other = read_holder(Path(self.marker))
        taken = f"{other} holds it" if other else "its file is gone"
        raise LeaseLost(
            f"the lease on {self.stage} {self.key} is lost ({taken}): this process was suspended, "
            "or the file system was out of reach, for longer than the lease lasts. Run the same "
            "command again: it continues from the last checkpoint or uses what the other process "
            "makes"
        )


class Lease:
    """A held lease."""

    def __init__(self, lock: SoftFileLease, holder: Holder) -> None:
        """Wrap a claim that `hold` has just got."""
        self._lock = lock
        self.holder = holder

    def check(self) -> None:
        """Return if the lease is still ours on disk.

        Raises:
            LeaseLost: it is not; the message says who holds it.
        """
        if self._lock.compromise is not None:
            self.claim.lost()
        self.claim.check()

    @property
    def claim(self) -> Claim:
        """The values that another process needs to check the lease."""
        holder = self.holder
        assert holder.token is not None, "it has been acquired"
        return Claim(self._lock.lock_file, holder.stage, holder.key, holder.token)

    def _ours(self) -> bool:
        owner = self._lock.owner
        return owner is not None and owner.token == self.holder.token


@contextmanager
def hold(
    root: Path,
    stage: str,
    key: str,
    *,
    duration_s: float = DURATION_S,
    on_wait: Callable[[str], None] | None = None,
    parents: Iterable[str] = (),
) -> Iterator[Lease]:
    """Hold the lease on (stage, key), waiting for it as long as it takes.

    A holder killed on this host is replaced at once, one on another host after the term. After
    acquiring, look the artifact up again: the one waited for may have published it.

    Args:
        root: the store's folder.
        stage: the stage to be made.
        key: its key.
        duration_s: the term; the same for all processes. The heartbeat renews it every third.
        on_wait: called with a message saying who holds it and since when, once per holder.
        parents: keys that the work reads; garbage collection keeps them meanwhile.

    Raises:
        UserError: the present holder uses another term, or the disk is full.
    """
    path = lease_path(root, stage, key)
    work = f"taking the lease on {stage} {key}"
    lock = SoftFileLease(path, lease_duration=duration_s, thread_local=False)
    with ExitStack() as stack:
        with disk_full_is_user_error(root, work, NOTE_BYTES, "Make room and run again."):
            path.parent.mkdir(parents=True, exist_ok=True)
            _wait_for(lock, f"{stage} {key}", on_wait)
            lease = stack.enter_context(_held(lock, stage, key, parents))
        yield lease


@contextmanager
def try_hold(root: Path, stage: str, key: str) -> Iterator[Lease | None]:
    """Hold the lease if it is free, else yield None at once (for garbage collection).

    A claim of another host whose heartbeat stopped ten minutes ago counts as free.
    """
    path = lease_path(root, stage, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(path, lease_duration=DURATION_S, thread_local=False)
    stamp = stamp_of(path)
    term = EMPTY_S if is_empty(path) else ABANDONED_S
    if stamp is not None and server_time(path.parent) - stamp[1] / 1e9 > term:
        break_stale(path, stamp)
    try:
        lock.acquire(blocking=False)
    except (Timeout, LeaseSettingsMismatch):
        yield None
        return
    with _held(lock, stage, key, ()) as lease:
        yield lease


def _wait_for(lock: SoftFileLease, work: str, on_wait: Callable[[str], None] | None) -> None:
    path = Path(lock.lock_file)
    announced: str | None = None
    seen, since = stamp_of(path), time.monotonic()
    while True:
        try:
            lock.acquire(blocking=False)
            return
        except Timeout:
            holder = read_holder(path)
        except LeaseSettingsMismatch as error:
            raise UserError(
                f"{work} is held by {read_holder(path)} with another lease term: {error}. Let that "
                "process end, or run this one with the same version of rlhf_exp"
            ) from error
        if holder is not None and holder.token != announced and on_wait is not None:
            on_wait(f"waiting for {work}: {holder} is making it")
            announced = holder.token
        # filelock replaces a silent holder by exchanging two names, which NFS refuses, and never
        # one that was killed before it signed.
        term = EMPTY_S if is_empty(path) else 1.5 * lock.lease_duration + 1
        if (stamp := stamp_of(path)) != seen:
            seen, since = stamp, time.monotonic()
        elif stamp and time.monotonic() - since > term:
            break_stale(path, stamp)
        time.sleep(POLL_S)


@contextmanager
def _held(lock: SoftFileLease, stage: str, key: str, parents: Iterable[str]) -> Iterator[Lease]:
    note = Path(lock.lock_file).with_suffix(".json")
    holder = Holder(
        stage=stage,
        key=key,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=now(),
        parents=tuple(parents),
        token=lock.token,
        namespace=namespace(),
    )
    lease = Lease(lock, holder)
    try:
        write_json_atomic(note, asdict(holder), durable=False)
        yield lease
    finally:
        # The note of a successor must stay: it is ours only as long as the claim is.
        if lease._ours():
            note.unlink(missing_ok=True)
        lock.release()


# No claim of another host is this old by the file server's own clock while its holder lives.
ABANDONED_S = 600.0
# Making a marker and writing into it are two system calls: who leaves it empty was killed between.
EMPTY_S = 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        stage: the stage being made.
        key: its key.
        host: name of the machine.
        pid: process number there.
        since: ISO 8601 time in UTC, or None while unknown.
        parents: keys of the artifacts the work reads.
        token: names this claim, none before or after it.
        namespace: tells apart processes of containers on one host.
    """

    stage: str
    key: str
    host: str
    pid: int
    since: str | None = None
    parents: tuple[str, ...] = ()
    token: str | None = None
    namespace: str = ""

    def __str__(self) -> str:
        """Return `process 12 on node3 since 2026-01-31 10:00:00 UTC`."""
        since = f" since {self.since[:19].replace('T', ' ')} UTC" if self.since else ""
        return f"process {self.pid} on {self.host}{since}"


def lease_path(root: Path, stage: str, key: str) -> Path:
    """Return the marker's path in the store at `root`."""
    return root / ".leases" / f"{stage}-{key}.lease"


def holders(root: Path) -> list[Holder]:
    """Return the live holders of leases in the store at `root`; takes no lease.

    Dead ones of this host and those silent for ten minutes are left out.
    """
    folder = root / ".leases"
    live = []
    for path in sorted(folder.glob("*.lease")):
        holder = read_holder(path)
        if holder is not None and _alive(holder, path):
            live.append(holder)
    return live


def read_holder(marker: Path) -> Holder | None:
    """Return who holds the lease whose marker is `marker`, or None."""
    owner = SoftFileLease(marker).owner
    if owner is None:
        return None
    stage, _, key = marker.stem.partition("-")
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(marker.with_suffix(".json").read_text(encoding="utf-8"))
        # A dead holder's file stays until the next one writes its own: the token tells them apart.
        if content["token"] == owner.token:
            return Holder(**{**content, "parents": tuple(content["parents"])})
    return Holder(stage, key, owner.hostname.partition("?")[0], owner.pid, token=owner.token)


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Inode and modification time (ns) of a marker, or None when there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def is_empty(marker: Path) -> bool:
    """Return whether a marker is there without a word in it."""
    try:
        return marker.lstat().st_size == 0
    except FileNotFoundError:
        return False


def break_stale(path: Path, judged: tuple[int, int]) -> None:
    """Remove the marker judged stale, and no other: a successor's goes back to its place."""
    aside = path.with_name(f"{path.name}.stale.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        if stamp_of(path) != judged:
            return
        path.rename(aside)
    except FileNotFoundError:
        return
    if stamp_of(aside) != judged:
        # `link` never replaces: a third process that came meanwhile keeps the place.
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def server_time(folder: Path) -> float:
    """Seconds since the epoch by the clock that stamps files in `folder`."""
    probe = draft_of(folder / "clock")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def namespace() -> str:
    """Name the process namespace we run in: process numbers of another one mean nothing here."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _alive(holder: Holder, marker: Path) -> bool:
    if holder.host == socket.gethostname() and holder.namespace == namespace():
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    stamp = stamp_of(marker)
    return stamp is not None and time.time() - stamp[1] / 1e9 < ABANDONED_S
