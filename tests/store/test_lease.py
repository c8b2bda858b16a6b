import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store import lease
from rlhf_exp.store.lease import LeaseLost, break_stale, hold, lease_path, stamp_of, try_hold
from rlhf_exp.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from rlhf_exp.store.lease import LeaseLost, hold
from rlhf_exp.store.store import Store
with hold(Path(sys.argv[1]), "sft", "abc1", duration_s=float(sys.argv[2])) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        lease.check()
        print("still ours")
    except LeaseLost as error:
        print(error)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def holder(store: Store) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that holds the lease on sft abc1 until it is told to check and leave."""
    started: list[subprocess.Popen[str]] = []

    def start(duration_s: float = 30.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(store.root), str(duration_s)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> str:
    return process.communicate("check\n", timeout=30)[0]


def test_held_checked_and_let_go(store: Store) -> None:
    with hold(store.root, "sft", "abc1", parents=["def2"]) as held:
        held.check()
        (holder,) = lease.holders(store.root)
        assert (holder.stage, holder.key, holder.pid) == ("sft", "abc1", os.getpid())
        assert holder.parents == ("def2",)
        assert holder == held.holder
        with try_hold(store.root, "sft", "abc1") as other:
            assert other is None
        with try_hold(store.root, "sft", "def2") as other:
            assert other is not None
    assert lease.holders(store.root) == []
    assert list((store.root / ".leases").iterdir()) == []
    with pytest.raises(LeaseLost):
        held.check()


def test_let_go_after_an_exception(store: Store) -> None:
    with pytest.raises(RuntimeError), hold(store.root, "sft", "abc1"):
        raise RuntimeError
    assert list((store.root / ".leases").iterdir()) == []


def test_a_second_one_waits_and_is_told_for_whom(
    store: Store, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder()
    said: list[str] = []

    def on_wait(message: str) -> None:
        said.append(message)
        threading.Timer(0.5, release).start()

    def release() -> None:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    with hold(store.root, "sft", "abc1", on_wait=on_wait) as held:
        held.check()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for sft abc1: process {process.pid} on ")
    year = time.gmtime().tm_year
    assert f" since {year}-" in said[0]
    assert process.communicate()[0] == "still ours\n"


def test_a_killed_holder_is_replaced_at_once(
    store: Store, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder()
    process.kill()
    process.wait()
    assert lease.holders(store.root) == []
    start = time.monotonic()
    with hold(store.root, "sft", "abc1") as held:
        held.check()
        assert lease.holders(store.root) == [held.holder]
    # The term is 30 s: the dead process is recognised, not waited out.
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_silent_holder_is_replaced_after_its_term_and_notices(
    store: Store,
    holder: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    can_exchange: bool,
) -> None:
    if not can_exchange:
        # As on NFS, where two names cannot be exchanged in one step.
        monkeypatch.setattr("filelock._soft.exchange_names", lambda source, target: False)
    process = holder(0.6)
    process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with hold(store.root, "sft", "abc1", duration_s=0.6) as held:
        assert 0.5 < time.monotonic() - start < 10
        held.check()
        process.send_signal(signal.SIGCONT)
        said = told(process)
        assert "the lease on sft abc1 is lost" in said
        assert f"process {os.getpid()} on" in said
        # The loser's leaving takes nothing from the winner.
        held.check()
        assert lease.holders(store.root) == [held.holder]


def test_a_lease_whose_file_is_gone_is_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.01)
    with hold(store.root, "sft", "abc1") as held:
        lease_path(store.root, "sft", "abc1").unlink()
        with pytest.raises(LeaseLost, match="its file is gone"):
            held.check()


def test_another_term_is_a_user_error(
    store: Store, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    holder(20.0)
    with pytest.raises(UserError, match=r"sft abc1 is held by process \d+ .*another lease term"):
        hold(store.root, "sft", "abc1", duration_s=30.0).__enter__()


def test_a_full_disk_is_a_user_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(lease, "write_json_atomic", full)
    with pytest.raises(UserError, match="taking the lease on sft abc1: the disk is full"):
        hold(store.root, "sft", "abc1").__enter__()
    assert list((store.root / ".leases").iterdir()) == []


def test_only_the_judged_marker_is_broken(tmp_path: Path) -> None:
    marker = tmp_path / "sft-abc1.lease"
    marker.write_text("old")
    judged = stamp_of(marker)
    assert judged is not None
    marker.unlink()
    break_stale(marker, judged)  # gone already
    time.sleep(0.01)
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").rename(marker)
    break_stale(marker, judged)
    assert marker.read_text() == "new"
    break_stale(marker, stamp_of(marker))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_marker_that_changes_between_look_and_rename_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "sft-abc1.lease"
    marker.write_text("successor")
    judged = (1, 1)
    looks = iter([judged])
    real = stamp_of
    monkeypatch.setattr(lease, "stamp_of", lambda path: next(looks, None) or real(path))
    break_stale(marker, judged)
    assert marker.read_text() == "successor"
    assert list(tmp_path.iterdir()) == [marker]


FOREIGN = "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=t\nduration=30.0\n"


def foreign(store: Store, age_s: float) -> Path:
    marker = lease_path(store.root, "sft", "abc1")
    marker.parent.mkdir(parents=True)
    marker.write_text(FOREIGN)
    os.utime(marker, (time.time() - age_s, time.time() - age_s))
    return marker


@pytest.mark.parametrize(("age_s", "live"), [(60.0, True), (700.0, False)])
def test_another_hosts_claim_lasts_ten_minutes_for_collection(
    store: Store, age_s: float, live: bool
) -> None:
    foreign(store, age_s)
    found = lease.holders(store.root)
    assert [(one.host, one.pid, one.since) for one in found] == [("node7", 1, None)] * live
    with try_hold(store.root, "sft", "abc1") as held:
        assert (held is None) == live


def test_a_dead_holders_note_is_not_taken_for_the_next_ones(store: Store) -> None:
    marker = foreign(store, 0)
    note = {"stage": "sft", "key": "abc1", "host": "node3", "pid": 5, "parents": [], "token": "u"}
    marker.with_suffix(".json").write_text(json.dumps(note))
    holder = lease.read_holder(marker)
    assert holder is not None
    assert holder.host == "node7"


@pytest.mark.parametrize("age_s", [0.0, 60.0])
def test_a_marker_that_nobody_signed_is_free_after_two_seconds(store: Store, age_s: float) -> None:
    """Its maker was killed between making the file and writing into it."""
    marker = foreign(store, age_s)
    marker.write_text("")
    os.utime(marker, (time.time() - age_s, time.time() - age_s))
    with try_hold(store.root, "sft", "abc1") as held:
        assert (held is None) == (age_s == 0.0)


def test_who_waits_for_an_unsigned_marker_gets_it_after_two_seconds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(store, 0).write_text("")
    clock = itertools.count()  # a second passes between two looks
    ticking = SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda seconds: None)
    monkeypatch.setattr(lease, "time", ticking)
    with hold(store.root, "sft", "abc1") as held:
        held.check()
    assert next(clock) < 10  # and not 46, as for one who signed and fell silent
