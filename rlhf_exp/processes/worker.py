"""A worker process: it runs the leader's jobs, each in a process group, and exits with the leader.

A process group lasts for one job, so no process waits inside a collective while the leader waits
for a lease, a lock or the user.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_exp.errors import UserError
from rlhf_exp.processes.channel import JOIN_S, Channel, Message
from rlhf_exp.processes.environment import LaunchEnvironment, own_gpu
from rlhf_exp.processes.failures import ProcessFailure, exit_code_of, note_group
from rlhf_exp.signals import TERMINATED, ending_signals, leave_terminal

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE_S = 5.0
"""Time in which a process that was told to exit may close its records."""
HELD_S = 900.0
"""Time in which a failed process waits for the cluster to end its job or to notice a dead node."""
COLLECTIVE_S = 3600.0
"""Time-out of a collective: long, as rank 0 alone may write for long and deaths show without it."""
Work = Callable[[Any], dict[str, Any]]
"""Runs a job in one process: from JSON values to JSON values."""


class Worker:
    """The protocol between this process and the leader, seen from this process.

    The leader sends `stage` (with `number` and `work`), `interrupt` and `end` (with `code`); the
    worker sends `done` (with `result`), `failed` and `saves` (with `now`).

    Args:
        channel: The channel to the leader.
        environment: The launch environment of this process.
    """

    def __init__(self, channel: Channel, environment: LaunchEnvironment) -> None:
        self.channel, self.environment = channel, environment
        self.interrupted = threading.Event()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._working, self._released = False, False
        self._exit_code, self._must_exit = TERMINATED, False
        for number in {signal.SIGTERM, *ending_signals()}:
            signal.signal(number, self._handle_ending)
        threading.Thread(target=self._listen, name="channel to the leader", daemon=True).start()

    def serve(self, store: Store, work: Work) -> Message:
        """Run jobs until the leader ends the experiment; return the leader's last message.

        Args:
            store: The store that all processes share.
            work: Runs a job.

        Raises:
            SystemExit: The leader or this process failed; the leader tells the user.
        """
        while True:
            self._released = False
            message = self._next_message()
            if message["say"] == "end":
                if message["code"]:
                    raise SystemExit(message["code"])
                return message
            self.interrupted.clear()
            self._working = True
            try:
                with process_group(store, message["number"], self.environment):
                    result = work(message["work"])
            except BaseException as error:
                self._fail(error)
            self._working = False
            self.channel.send(say="done", result=result)

    @contextmanager
    def saving(self) -> Iterator[Callable[[], bool]]:
        """Tell the leader that Ctrl-C saves inside the block; yield whether it was pressed."""
        self.channel.send(say="saves", now=True)
        try:
            yield self.interrupted.is_set
        finally:
            self.channel.send(say="saves", now=False)
        if self.interrupted.is_set():
            raise KeyboardInterrupt

    def _next_message(self) -> Message:
        try:
            return self._messages.get()
        except (KeyboardInterrupt, SystemExit) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Report the error and exit, which closes the connections that the others wait on."""
        failure = ProcessFailure.of(self.environment.rank, error)
        self.channel.send(say="failed", **failure.message())
        sys.stdout.flush()
        sys.stderr.flush()
        if self.environment.cluster:
            # Until the leader sends `end` or is gone, or the cluster ends the job.
            time.sleep(HELD_S)
        os._exit(exit_code_of(error) or 1)

    def _handle_ending(self, number: int, frame: FrameType | None) -> None:
        if self._must_exit or not self.environment.cluster:
            if number == signal.SIGHUP:
                leave_terminal()
            raise SystemExit(self._exit_code)

    def _listen(self) -> None:
        while True:
            try:
                message = self.channel.receive()
            except EOFError:
                if self._released:
                    self._messages.put({"say": "end", "code": 1})
                    return
                # The next command continues this work and must not find this process still at it.
                os._exit(1)
            if message["say"] == "interrupt":
                self.interrupted.set()
            elif message["say"] == "end" and self._working:
                self._exit_while_working(message["code"])
            else:
                self._released = message["say"] == "end"
                self._messages.put(message)

    def _exit_while_working(self, code: int) -> None:
        self._exit_code, self._must_exit = code, True
        # The main thread may have records to close, if it is not stuck in a collective.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(code)


def open_store(environment: LaunchEnvironment) -> Store:
    """Return the store that all processes of a run share.

    torchrun's agent hosts it; elsewhere rank 0 does, at the port of the launch environment.

    Raises:
        UserError: The store cannot be reached, or the port is taken.
    """
    from torch.distributed import DistError, rendezvous

    environment.export()
    rank, address = environment.rank, f"{environment.address}:{environment.port}"
    try:
        meeting = rendezvous(
            "env://", rank, environment.processes, timeout=timedelta(seconds=JOIN_S)
        )
        store: Store = next(meeting)[0]
    except DistError as error:
        raise UserError(
            f"rank {rank} cannot meet the others at {address}: {error}. "
            "All processes must run the same command, reach that machine, and find the port free"
        ) from error
    return store


@contextmanager
def process_group(store: Store, number: int, environment: LaunchEnvironment) -> Iterator[None]:
    """Hold torch's default process group inside the block.

    Args:
        store: The store that all processes share.
        number: Number of the group, which no other group of the run has.
        environment: The launch environment of this process.

    Raises:
        UserError: There are fewer GPUs than processes.
    """
    import torch
    from torch import distributed

    store = distributed.PrefixStore(f"stage-{number}", store)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        _claim_gpu(store, environment)
    note_group()
    distributed.init_process_group(
        backend,
        store=store,
        rank=environment.rank,
        world_size=environment.processes,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    yield
    # Not after an error: the others may be gone, and this process is about to exit as well.
    distributed.destroy_process_group()


def _claim_gpu(store: Store, environment: LaunchEnvironment) -> None:
    """Make a GPU this process's device, unless another process has it.

    A number says nothing of that: each process may see GPUs of its own.

    Raises:
        UserError: Another process has it.
    """
    import torch

    number = own_gpu(environment.local_rank)
    name = f"gpu {socket.gethostname()} {torch.cuda.get_device_properties(number).uuid}"
    owner = store.compare_set(name, "", str(environment.rank)).decode()
    if owner != str(environment.rank):
        raise UserError(
            f"{environment.local_processes} processes on this machine need as many GPUs, and "
            f"the one that rank {environment.rank} sees under number {number}, of "
            f"{torch.cuda.device_count()}, is already that of rank {owner}; set "
            "distributed.processes to the number of GPUs, or give each process its own "
            "(`srun --gpus-per-task=1`)"
        )
    torch.cuda.set_device(number)
