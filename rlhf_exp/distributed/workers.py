"""Workers that this process starts on its own machine, and leads without being one of them.

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
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from rlhf_exp.distributed.failure import Failure, Kind, cause, ended
from rlhf_exp.distributed.lines import Line, Message
from rlhf_exp.distributed.member import GRACE_S, Member
from rlhf_exp.distributed.place import Place

POLL_S = 0.2
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
        self._lines: list[Line] = []
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
                place = Place(rank, self._count, rank, self._count, "127.0.0.1", 0, "launch.py")
                process = spawn.Process(
                    target=_work,
                    args=(theirs, place, self.threads, os.getpid(), *self._arguments),
                    name=f"rank {rank}",
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._lines.append(Line(ours))
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
        failures: dict[int, Failure] = {}
        heard = self._listen(POLL_S, failures)
        if failures:
            time.sleep(SETTLE_S)
            self._listen(0.0, failures)
            cause(list(failures.values())).throw()
        return heard

    def _listen(self, seconds: float, failures: dict[int, Failure]) -> list[tuple[int, Message]]:
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
                    failures[rank] = Failure.from_message(message)
                else:
                    heard.append((rank, message))
        return heard

    def _gone(self, rank: int) -> Failure:
        process = self._processes[rank]
        process.join(GRACE_S)
        return Failure(rank, Kind.gone, ended(process.exitcode or 0))


def _work(
    connection: Connection, place: Place, threads: int, leader: int, target: Target, setup: object
) -> None:
    """What a worker runs from its first moment."""
    _die_with(leader)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        # Nobody else takes part, and not every machine knows its own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place.export()
    from torch.distributed import TCPStore

    line = Line(connection)
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
