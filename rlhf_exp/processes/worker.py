"""A process that does not lead: it does what the leader says, and ends when the leader does.

The process group of one stage, made when it begins and destroyed when it is done.

No group lasts longer, so nothing waits inside a collective while a lease, a lock or a person is
waited for.
"""

from __future__ import annotations

import os
import queue
import signal
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
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.processes.failures import TERMINATED, ProcessFailure, code_of, note_group

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE_S = 5.0
"""How long a process that was told to leave may take to close its records."""
HELD_S = 900.0
"""How long one that has failed waits for the cluster to end its job, or to miss a machine."""
Work = Callable[[Any], dict[str, Any]]
"""What a process does in a stage: from JSON values to JSON values."""


class Member:
    """This process's end of the line to the leader.

    Messages: `stage` (with `number` and `work`), `interrupt`, and `end` (with `code`) come; `done`,
    `failed` and `saves` go.

    Args:
        line: The line.
        place: This process's.
    """

    def __init__(self, line: Channel, place: LaunchEnvironment) -> None:
        self.line, self.place = line, place
        self.asked = threading.Event()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._busy, self._free = False, False
        self._code, self._told = TERMINATED, False
        signal.signal(signal.SIGTERM, self._leave)
        threading.Thread(target=self._listen, name="line to the leader", daemon=True).start()

    def serve(self, store: Store, work: Work) -> Message:
        """Do stages until the leader says that the experiment is over; return its last message.

        Raises:
            SystemExit: The leader or this process failed; the leader tells the user.
        """
        while True:
            self._free = False
            message = self._next()
            if message["say"] == "end":
                if message["code"]:
                    raise SystemExit(message["code"])
                return message
            self.asked.clear()
            self._busy = True
            try:
                with process_group(store, message["number"], self.place):
                    result = work(message["work"])
            except BaseException as error:
                self._fail(error)
            self._busy = False
            self.line.send(say="done", result=result)

    @contextmanager
    def saving(self) -> Iterator[Callable[[], bool]]:
        """Let the leader know that Ctrl-C finds something to save; yield whether it was pressed."""
        self.line.send(say="saves", now=True)
        try:
            yield self.asked.is_set
        finally:
            self.line.send(say="saves", now=False)
        if self.asked.is_set():
            raise KeyboardInterrupt

    def _next(self) -> Message:
        try:
            return self._messages.get()
        except (KeyboardInterrupt, SystemExit) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Tell the leader, and go: connections that close end what the others are waiting for."""
        failure = ProcessFailure.of(self.place.rank, error)
        self.line.send(say="failed", **failure.message())
        sys.stdout.flush()
        sys.stderr.flush()
        if self.place.cluster:
            # Until the leader says so, is gone, or the job is ended.
            time.sleep(HELD_S)
        os._exit(code_of(error) or 1)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self._told or not self.place.cluster:
            raise SystemExit(self._code)

    def _listen(self) -> None:
        while True:
            try:
                message = self.line.receive()
            except EOFError:
                if self._free:
                    self._messages.put({"say": "end", "code": 1})
                    return
                # Whoever goes on with the work must not find this process still at it.
                os._exit(1)
            if message["say"] == "interrupt":
                self.asked.set()
            elif message["say"] == "end" and self._busy:
                self._end(message["code"])
            else:
                self._free = message["say"] == "end"
                self._messages.put(message)

    def _end(self, code: int) -> None:
        """Leave in the middle of the work."""
        self._code, self._told = code, True
        # The main thread may have records to close, if it is not stuck in a collective.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(code)


COLLECTIVE_S = 3600.0
"""How long a collective waits. Deaths are noticed without it; rank 0 alone may write for long."""


def open_store(place: LaunchEnvironment) -> Store:
    """Return the store that all processes of a run share.

    torchrun's agent hosts it; elsewhere rank 0 does, at the port of its place.

    Raises:
        UserError: It cannot be reached, or the port is taken.
    """
    from torch.distributed import DistError, rendezvous

    place.export()
    try:
        found = rendezvous("env://", place.rank, place.processes, timeout=timedelta(seconds=JOIN_S))
        store: Store = next(found)[0]
    except DistError as error:
        raise UserError(
            f"rank {place.rank} cannot meet the others at {place.address}:{place.port}: {error}. "
            "All processes must run the same command, reach that machine, and find the port free"
        ) from error
    return store


@contextmanager
def process_group(store: Store, number: int, place: LaunchEnvironment) -> Iterator[None]:
    """Be in torch's default process group while entered.

    Args:
        store: What all processes share.
        number: Differs from one group to the next.
        place: This process's.

    Raises:
        UserError: There are fewer devices than processes.
    """
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{place.local_processes} processes on this machine need as many GPUs, and it has "
                f"{torch.cuda.device_count()}; set distributed.processes to what there is"
            )
        torch.cuda.set_device(place.local_rank)
    note_group()
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"stage-{number}", store),
        rank=place.rank,
        world_size=place.processes,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    yield
    # Not after an error: others may be gone, and this process is about to leave, too.
    distributed.destroy_process_group()
