"""Who holds a lease: read from the files, without taking it; and removing a stale claim."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease

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
    found = []
    for path in sorted(folder.glob("*.lease")):
        holder = read_holder(path)
        if holder is not None and _alive(holder, path):
            found.append(holder)
    return found


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
    probe = folder / f".clock.{os.getpid()}.{secrets.token_hex(4)}.draft"
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
