"""The leader of a run's processes: it runs jobs on all of them and ends them together.

There are two transports. `StartedWorkers` starts workers on this machine; the leader is none of
them, and imports no torch. `JoinedProcesses` are those that torchrun or Slurm has started; the
leader is rank 0 and works, too. Both live as long as the experiment and run its stages one after
another, each in a process group of its own.
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
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_exp.processes.channel import Channel, accept_workers, connect_to_leader
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.processes.failures import (
    FailureKind,
    ProcessFailure,
    WorkerGone,
    describe_exit,
    exit_code_of,
    root_cause,
)
from rlhf_exp.processes.worker import GRACE_S, Work, Worker, open_store, process_group
from rlhf_exp.redaction import install
from rlhf_exp.signals import TERMINATED

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.05
STUCK_S = 20.0
"""Time after which rank 0 leaves a collective that a failed process will never join."""
_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG
Target = Callable[[Any, Worker, Any], None]
"""The main function of a started worker: its setup, its worker and the shared store."""


def _never() -> bool:
    return False


@dataclass
class _Replies:
    """The other processes' messages; written by the listening thread.

    Attributes:
        failures: Each rank's first failure, in the order in which they became known.
        results: The results of the present job, by rank.
        closed: The ranks whose channels have closed.
    """

    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)


class Leader:
    """Runs jobs on all processes of a run.

    Args:
        transport: The other processes and the channels to them.

    Attributes:
        saving: Whether the workers have something to save on Ctrl-C at present.
    """

    def __init__(self, transport: StartedWorkers | JoinedProcesses) -> None:
        self.transport = transport
        self.saving = False
        self._replies = _Replies()
        self._listener: threading.Thread | None = None
        self._jobs = 0
        self._working = False
        # Once this process is on its way out, the failures of others follow from that.
        self._exiting = False
        if isinstance(transport, JoinedProcesses):
            signal.signal(signal.SIGTERM, self._handle_sigterm)
            self._start_listening()

    def run(
        self, job: object, work: Work | None = None, interrupted: Callable[[], bool] = _never
    ) -> dict[str, Any]:
        """Run a job on all processes, and return the result of rank 0.

        Args:
            job: The job as JSON values.
            work: Runs the job in this process, where the leader is rank 0.
            interrupted: Whether the user has pressed Ctrl-C; the workers are told once.

        Raises:
            UserError: A process raised it.
            WorkerFailed: A process failed or was killed.
            KeyboardInterrupt: The workers have saved and exited after Ctrl-C.
        """
        if self._listener is None:
            self.transport.start()
            self._start_listening()
        replies = self._replies
        self._jobs += 1
        replies.results.clear()
        # Set before the job is sent: `_stop_main_thread` must not take this process for idle.
        self._working = isinstance(self.transport, JoinedProcesses)
        self._send(say="stage", number=self._jobs, work=job)
        if isinstance(self.transport, JoinedProcesses):
            assert work is not None, "rank 0 works, too"
            replies.results[0] = self._work(self.transport, job, work)
        forwarded = False
        while not replies.failures and len(replies.results) < self.transport.processes:
            if interrupted() and not forwarded:
                forwarded = True
                self._send(say="interrupt")
            time.sleep(POLL_S)
        self.saving = False
        if replies.failures:
            self._exiting = True
            time.sleep(self.transport.settle_s)
            self._raise_root_cause()
        return replies.results[0]

    def end(self, error: BaseException | None, **values: Any) -> None:  # noqa: ANN401 - JSON values
        """Tell the others how the experiment has ended; after an error they exit.

        Args:
            error: The error that ended it, if one did.
            **values: Plain values for the others.
        """
        code = exit_code_of(error)
        self._exiting |= code != 0
        if self.transport.cluster and isinstance(error, WorkerGone):
            # Its machine may be dead: the cluster starts the job again if nobody ends it before.
            return
        self._send(say="end", code=code, **values)
        try:
            self.transport.await_exits(code, lambda: len(self._replies.closed))
        finally:
            if isinstance(self.transport, StartedWorkers):
                self._forget_workers(self.transport)

    def _work(self, transport: JoinedProcesses, job: object, work: Work) -> dict[str, Any]:
        """Run the job in this process."""
        try:
            with process_group(transport.store, self._jobs, transport.environment):
                return work(job)
        except BaseException as error:
            self._exiting = True
            failure = ProcessFailure.of(0, error)
            if failure.kind in (FailureKind.bug, FailureKind.stopped, FailureKind.elsewhere):
                # This may follow from a failure, or the absence, of another process.
                _wait_until(lambda: bool(self._replies.failures), EXIT_S)
                if self._replies.failures:
                    self._raise_root_cause(failure)
            raise
        finally:
            self._working = False

    def _raise_root_cause(self, *own: ProcessFailure) -> NoReturn:
        failure = root_cause([*self._replies.failures.values(), *own])
        self._described(failure).reraise()

    def _described(self, failure: ProcessFailure) -> ProcessFailure:
        """Return a failure with the description of how the process ended, if it is gone."""
        if failure.kind is not FailureKind.gone:
            return failure
        return replace(failure, text=self.transport.describe_exit(failure.rank))

    def _send(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        for channel in self.transport.channels.values():
            channel.send(**message)

    def _start_listening(self) -> None:
        self._listener = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._listener.start()

    def _forget_workers(self, workers: StartedWorkers) -> None:
        if self._listener is not None:
            # All workers are gone, so it ends, unless a child of theirs holds a channel open.
            self._listener.join(GRACE_S)
        workers.close()
        self._replies, self._listener = _Replies(), None

    def _listen(self) -> None:
        replies, channels = self._replies, dict(self.transport.channels)
        while channels:
            ready = wait([channel.connection for channel in channels.values()])
            for rank, channel in list(channels.items()):
                if channel.connection not in ready:
                    continue
                try:
                    message = channel.receive()
                except EOFError:
                    del channels[rank]
                    replies.closed.add(rank)
                    self._note_failure(replies, ProcessFailure(rank, FailureKind.gone, ""))
                    continue
                match message["say"]:
                    case "failed":
                        self._note_failure(replies, ProcessFailure.from_message(message))
                    case "done":
                        replies.results[rank] = message["result"]
                    case "saves":
                        self.saving = message["now"]

    def _note_failure(self, replies: _Replies, failure: ProcessFailure) -> None:
        """Note a rank's first failure; called in the listening thread."""
        first = replies.failures.setdefault(failure.rank, failure) is failure
        if first and not self._exiting and isinstance(self.transport, JoinedProcesses):
            threading.Thread(target=self._stop_main_thread, args=(failure,), daemon=True).start()

    def _stop_main_thread(self, failure: ProcessFailure) -> None:
        """Stop the main thread's work after another process's failure, unless it ends by itself."""
        if self._working:
            # A collective that lost a process raises, as a rule.
            time.sleep(STUCK_S)
            if self._working and not self.transport.cluster:
                text = self._described(failure).text
                print(f"rank {failure.rank}: {text}", file=sys.stderr, flush=True)
                os._exit(1)
        else:
            # Ctrl-C reaches all processes, so this one may be about to exit, too.
            time.sleep(EXIT_S)
            if not self._exiting:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _handle_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Exit on SIGTERM, sent by `_stop_main_thread`, by a launcher after a death, or to stop."""
        failures = self._replies.failures
        if self._exiting or (failures and self._working):
            return
        if self.transport.cluster and not failures:
            return
        self._exiting = True
        if failures:
            self._raise_root_cause()
        raise SystemExit(TERMINATED)


EXIT_S = 1.0
"""Time in which joined processes exit together, or learn why another one has exited."""


class JoinedProcesses:
    """Processes that something else has started; this one is rank 0.

    Args:
        environment: The launch environment of this process.
        store: The store that all processes share.
        channels: A channel to each of the other processes, by rank.
    """

    settle_s = 0.0

    def __init__(
        self, environment: LaunchEnvironment, store: Store, channels: dict[int, Channel]
    ) -> None:
        self.environment, self.store, self.channels = environment, store, channels
        self.processes, self.local_processes = environment.processes, environment.local_processes
        self.cluster = environment.cluster

    def start(self) -> None:
        """Do nothing: the processes run already."""

    def describe_exit(self, rank: int) -> str:
        """Return in words how the process of a closed channel ended."""
        return (
            "was killed or lost its connection. The same command goes on from the last checkpoint"
        )

    def await_exits(self, code: int, closed: Callable[[], int]) -> None:
        """Wait after an error until the others have exited.

        All have the same exit code if they exit before a launcher notices that one is gone.

        Args:
            code: The exit code.
            closed: Returns the number of channels that have closed.
        """
        if code:
            _wait_until(lambda: closed() == len(self.channels), EXIT_S)


class StartedWorkers:
    """Workers that this process starts on its own machine.

    Args:
        processes: Number of workers.
        threads: CPU threads of each.
        target: The main function of each worker, a function of a module.
        setup: The first argument of `target`; must be picklable.
    """

    settle_s = 0.5
    """Time after the first failure in which the others may report the failure it follows from."""
    cluster = False

    def __init__(self, processes: int, threads: int, target: Target, setup: object) -> None:
        self.processes = self.local_processes = processes
        self.threads = threads
        self.channels: dict[int, Channel] = {}
        self._arguments = (target, setup)
        self._processes: list[SpawnProcess] = []

    def start(self) -> None:
        """Start the workers.

        Raises:
            WorkerGone: Rank 0 died before it was ready.
        """
        spawn = multiprocessing.get_context("spawn")
        # The terminal sends Ctrl-C to all processes at any moment; only the leader passes it on.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for rank in range(self.processes):
                ours, theirs = spawn.Pipe()
                environment = LaunchEnvironment(
                    rank, self.processes, rank, self.processes, "127.0.0.1", 0, "launch.py"
                )
                process = spawn.Process(
                    target=_run_worker,
                    args=(theirs, environment, self.threads, os.getpid(), *self._arguments),
                    name=f"rank {rank}",
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self.channels[rank] = Channel(ours)
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            port = self.channels[0].receive()["port"]
        except EOFError:
            ProcessFailure(0, FailureKind.gone, self.describe_exit(0)).reraise()
        for rank in range(1, self.processes):
            self.channels[rank].send(port=port)

    def describe_exit(self, rank: int) -> str:
        """Return in words how the process of a closed channel ended."""
        process = self._processes[rank]
        process.join(GRACE_S)
        return describe_exit(process.exitcode or 0)

    def await_exits(self, code: int, closed: Callable[[], int]) -> None:
        """Wait until all workers have exited, and kill those that do not.

        Args:
            code: The exit code.
            closed: Returns the number of channels that have closed.
        """
        deadline = time.monotonic() + GRACE_S + 1
        try:
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:  # Ctrl-C may come meanwhile
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()

    def close(self) -> None:
        """Forget the workers, which are gone."""
        for channel in self.channels.values():
            channel.close()
        self.channels.clear()
        self._processes.clear()


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, at most for some seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)


@cache
def joined_leader(environment: LaunchEnvironment) -> Leader:
    """Return the leader of the processes that joined, made at the first call; called by rank 0."""
    store = open_store(environment)
    channels = accept_workers(store, environment.processes)
    return Leader(JoinedProcesses(environment, store, channels))


@cache
def joined_worker(environment: LaunchEnvironment) -> tuple[Worker, Store]:
    """Return the worker and store of another process that joined, made at the first call."""
    store = open_store(environment)
    channel = connect_to_leader(store, environment.address, environment.rank)
    return Worker(channel, environment), store


def _run_worker(
    connection: Connection,
    environment: LaunchEnvironment,
    threads: int,
    leader_pid: int,
    target: Target,
    setup: object,
) -> None:
    """Run a started worker from its first moment."""
    _exit_with(leader_pid)
    install()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        # All workers are on this machine, and not every machine can resolve its own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.export()
    from torch.distributed import TCPStore

    channel = Channel(connection)
    if environment.rank == 0:
        store = TCPStore(environment.address, 0, is_master=True, wait_for_workers=False)
        channel.send(say="ready", port=store.port)
    else:
        try:
            port = channel.receive()["port"]
        except EOFError:
            sys.exit(1)
        store = TCPStore(environment.address, port, is_master=False)
    environment = replace(environment, port=store.port)
    environment.export()
    target(setup, Worker(channel, environment), store)


def _exit_with(leader_pid: int) -> None:
    """Let the kernel kill this process with its leader, whatever state both are in (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != leader_pid:
            sys.exit(1)
