"""Processes that something else has started together: rank 0 leads, and takes part.

The lines between them are made once a process; a task of a cluster may run several stages, and
several experiments, one after another.

Workers that this process starts on its own machine, and leads without being one of them.

They live as long as the experiment and do its stages one after another, each in a process group of
its own. The leader imports no torch.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

from rlhf_exp.processes.channel import Channel, Message, await_members, call_leader
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.processes.failures import (
    TERMINATED,
    FailureKind,
    ProcessFailure,
    WorkerGone,
    cause,
    code_of,
    ended,
)
from rlhf_exp.processes.worker import GRACE_S, Member, Work, open_store, process_group

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.2
JOINED_SETTLE_S = 1.0
STUCK_S = 20.0
"""After so long in a collective that a failed process will never join, rank 0 leaves it."""
_GONE = "was killed or lost its connection. The same command goes on from the last checkpoint"


class Leader:
    """Rank 0's end of the lines to the others.

    Args:
        place: This process's.
        store: What all processes share.
        lines: To each of the other processes, by rank.
    """

    def __init__(self, place: LaunchEnvironment, store: Store, lines: dict[int, Channel]) -> None:
        self.place, self.store, self._lines = place, store, lines
        self._heard = _Heard()
        self._number = 0
        signal.signal(signal.SIGTERM, self._leave)
        threading.Thread(target=self._listen, name="lines to members", daemon=True).start()

    def run(self, order: object, work: Work) -> dict[str, Any]:
        """Do a stage with all others, and return what rank 0, this process, makes of it.

        Args:
            order: What to do, JSON values.
            work: Does it.

        Raises:
            UserError: A process raised it.
            WorkerFailed: Another process failed, or was killed.
        """
        heard = self._heard
        self._number += 1
        heard.begin()
        self._tell(say="stage", number=self._number, work=order)
        try:
            with process_group(self.store, self._number, self.place):
                result = work(order)
        except BaseException as error:
            heard.ending = True
            ours = ProcessFailure.of(self.place.rank, error)
            if ours.kind in (FailureKind.bug, FailureKind.stopped, FailureKind.elsewhere):
                # What others have met, or their absence, may be what this follows from.
                heard.wait(lambda: bool(heard.failures), JOINED_SETTLE_S)
                if heard.failures:
                    cause([*heard.failures.values(), ours]).throw()
            raise
        finally:
            heard.busy = False
        heard.wait(lambda: bool(heard.failures) or len(heard.done) == len(self._lines))
        if heard.failures:
            heard.ending = True
            cause(list(heard.failures.values())).throw()
        return result

    def end(self, error: BaseException | None, **words: Any) -> None:  # noqa: ANN401 - JSON values
        """Tell the others how the experiment has ended; after an error they leave."""
        code = code_of(error)
        self._heard.ending |= code != 0
        if self.place.cluster and isinstance(error, WorkerGone):
            # Its machine may be dead: the cluster starts the job again if nobody ends it before.
            return
        self._tell(say="end", code=code, **words)
        if code:
            # So that all end with this code, before a launcher sees that one is gone.
            self._heard.wait(lambda: len(self._heard.hung_up) == len(self._lines), JOINED_SETTLE_S)

    def _tell(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        for line in self._lines.values():
            line.send(**message)

    def _listen(self) -> None:
        lines = dict(self._lines)
        while lines:
            ready = wait([line.connection for line in lines.values()])
            for rank, line in list(lines.items()):
                if line.connection not in ready:
                    continue
                try:
                    message = line.receive()
                except EOFError:
                    del lines[rank]
                    self._heard.hang_up(rank)
                    self._failed(ProcessFailure(rank, FailureKind.gone, _GONE))
                    continue
                if message["say"] == "failed":
                    self._failed(ProcessFailure.from_message(message))
                elif message["say"] == "done":
                    self._heard.finish(rank)

    def _failed(self, failure: ProcessFailure) -> None:
        """Note a failure; runs in the thread that listens."""
        if self._heard.fail(failure) and not self._heard.ending:
            threading.Thread(target=self._stop, args=(failure,), daemon=True).start()

    def _stop(self, failure: ProcessFailure) -> None:
        """End the main thread's work, unless it ends by itself."""
        heard = self._heard
        if heard.busy:
            # A collective that lost a process raises, as a rule.
            time.sleep(STUCK_S)
            if heard.busy and not self.place.cluster:
                print(f"rank {failure.rank}: {failure.text}", file=sys.stderr, flush=True)
                os._exit(1)
        else:
            time.sleep(
                JOINED_SETTLE_S
            )  # Ctrl-C reaches all: this process may be on its way out, too
            if not heard.ending:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: sent by `_stop`, by a launcher that sees a process end, or to stop."""
        heard = self._heard
        if heard.ending or (heard.failures and heard.busy):
            return
        if self.place.cluster and not heard.failures:
            return
        heard.ending = True
        if heard.failures:
            cause(list(heard.failures.values())).throw()
        raise SystemExit(TERMINATED)


@dataclass
class _Heard:
    """What has been heard of the others; shared between the main thread and the one that listens.

    Attributes:
        failures: Each rank's first failure, in the order in which they became known.
        done: The ranks that have done the present stage.
        hung_up: The ranks that are gone.
        busy: Whether this process is at work on a stage.
        ending: Whether this process is on its way out: what happens then follows from it.
    """

    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    hung_up: set[int] = field(default_factory=set)
    busy: bool = False
    ending: bool = False

    def begin(self) -> None:
        self.done.clear()
        self.busy = True

    def fail(self, failure: ProcessFailure) -> bool:
        """Note a failure; return whether it is its rank's first."""
        return self.failures.setdefault(failure.rank, failure) is failure

    def finish(self, rank: int) -> None:
        self.done.add(rank)

    def hang_up(self, rank: int) -> None:
        self.hung_up.add(rank)

    def wait(self, until: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait for something to be heard, at most for some seconds."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not until() and (deadline is None or time.monotonic() < deadline):
            time.sleep(POLL_S / 4)


@cache
def leader(place: LaunchEnvironment) -> Leader:
    """Return rank 0's lines, made at the first call."""
    store = open_store(place)
    return Leader(place, store, await_members(store, place.processes))


@cache
def member(place: LaunchEnvironment) -> tuple[Member, Store]:
    """Return another process's line and store, made at the first call."""
    store = open_store(place)
    return Member(call_leader(store, place.address, place.rank), place), store


SETTLE_S = 0.5
"""Within so long after the first failure, the others may say what it follows from."""
_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG
Target = Callable[[Any, Member, Any], None]
"""What a worker does with what it was given, its line to the leader, and the shared store."""


class Workers:
    """The workers of one experiment.

    Args:
        processes: How many.
        threads: CPU threads of each.
        target: What each of them runs, a function of a module.
        setup: What `target` is given; must be picklable.
    """

    def __init__(self, processes: int, threads: int, target: Target, setup: object) -> None:
        self.threads = threads
        self._arguments = (target, setup)
        self._count = processes
        self._processes: list[SpawnProcess] = []
        self._lines: list[Channel] = []
        self._port = 0
        self._number = 0
        self.saving = False

    def run(self, work: object, asked: Callable[[], bool]) -> dict[str, Any]:
        """Let all workers do a stage, and return what rank 0 answers.

        Args:
            work: What to do, JSON values.
            asked: Whether the user has pressed Ctrl-C; the workers are told once.

        Raises:
            UserError: A worker raised it.
            WorkerFailed: A worker failed, or was killed.
            KeyboardInterrupt: They have saved and left, as asked.
        """
        if not self._processes:
            self._start()
        self._number += 1
        self._tell(say="stage", number=self._number, work=work)
        results: dict[int, dict[str, Any]] = {}
        told = False
        while len(results) < self._count:
            if asked() and not told:
                told = True
                self._tell(say="interrupt")
            for rank, message in self._hear():
                match message["say"]:
                    case "done":
                        results[rank] = message["result"]
                    case "saves":
                        self.saving = message["now"]
        self.saving = False
        return results[0]

    def end(self, code: int) -> None:
        """Let all workers go, those still at work with an exit code, and see that they are gone."""
        self._tell(say="end", code=code)
        deadline = time.monotonic() + GRACE_S + 1
        try:
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:  # Ctrl-C may come meanwhile
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
            for line in self._lines:
                line.close()
            self._processes, self._lines, self._port = [], [], 0

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        # The terminal sends Ctrl-C to all of them, at any moment: who leads passes it on instead.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for rank in range(self._count):
                ours, theirs = spawn.Pipe()
                place = LaunchEnvironment(
                    rank, self._count, rank, self._count, "127.0.0.1", 0, "launch.py"
                )
                process = spawn.Process(
                    target=_work,
                    args=(theirs, place, self.threads, os.getpid(), *self._arguments),
                    name=f"rank {rank}",
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._lines.append(Channel(ours))
        finally:
            signal.signal(signal.SIGINT, before)
        while not self._port:
            for _, message in self._hear():
                self._port = message["port"]
        for line in self._lines[1:]:
            line.send(port=self._port)

    def _tell(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        for line in self._lines:
            line.send(**message)

    def _hear(self) -> list[tuple[int, Message]]:
        """Return what has been said for a moment, by rank; failures are raised."""
        failures: dict[int, ProcessFailure] = {}
        heard = self._listen(POLL_S, failures)
        if failures:
            time.sleep(SETTLE_S)
            self._listen(0.0, failures)
            cause(list(failures.values())).throw()
        return heard

    def _listen(
        self, seconds: float, failures: dict[int, ProcessFailure]
    ) -> list[tuple[int, Message]]:
        heard: list[tuple[int, Message]] = []
        wait([line.connection for line in self._lines], seconds)
        for rank, line in enumerate(self._lines):
            while rank not in failures and line.connection.poll():
                try:
                    message = line.receive()
                except EOFError:
                    failures[rank] = self._gone(rank)
                    continue
                if message["say"] == "failed":
                    failures[rank] = ProcessFailure.from_message(message)
                else:
                    heard.append((rank, message))
        return heard

    def _gone(self, rank: int) -> ProcessFailure:
        process = self._processes[rank]
        process.join(GRACE_S)
        return ProcessFailure(rank, FailureKind.gone, ended(process.exitcode or 0))


def _work(
    connection: Connection,
    place: LaunchEnvironment,
    threads: int,
    leader: int,
    target: Target,
    setup: object,
) -> None:
    """What a worker runs from its first moment."""
    _die_with(leader)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        # Nobody else takes part, and not every machine knows its own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place.export()
    from torch.distributed import TCPStore

    line = Channel(connection)
    if place.rank == 0:
        store = TCPStore(place.address, 0, is_master=True, wait_for_workers=False)
        line.send(say="ready", port=store.port)
    else:
        try:
            port = line.receive()["port"]
        except EOFError:
            sys.exit(1)
        store = TCPStore(place.address, port, is_master=False)
    place = replace(place, port=store.port)
    place.export()
    target(setup, Member(line, place), store)


def _die_with(leader: int) -> None:
    """Let the kernel end this process with its leader, whatever state both are in (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != leader:
            sys.exit(1)
