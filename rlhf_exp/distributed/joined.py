"""Processes that something else has started together: rank 0 leads, and takes part.

The lines between them are made once a process; a task of a cluster may run several stages, and
several experiments, one after another.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from types import FrameType
from typing import TYPE_CHECKING, Any

from rlhf_exp.distributed.failure import TERMINATED, Failure, Kind, WorkerGone, cause, code_of
from rlhf_exp.distributed.group import open_store, process_group
from rlhf_exp.distributed.lines import Line, await_members, call_leader
from rlhf_exp.distributed.member import Member, Work
from rlhf_exp.distributed.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.2
SETTLE_S = 1.0
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

    def __init__(self, place: Place, store: Store, lines: dict[int, Line]) -> None:
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
            ours = Failure.of(self.place.rank, error)
            if ours.kind in (Kind.bug, Kind.stopped, Kind.elsewhere):
                # What others have met, or their absence, may be what this follows from.
                heard.wait(lambda: bool(heard.failures), SETTLE_S)
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
            self._heard.wait(lambda: len(self._heard.hung_up) == len(self._lines), SETTLE_S)

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
                    self._failed(Failure(rank, Kind.gone, _GONE))
                    continue
                if message["say"] == "failed":
                    self._failed(Failure.from_message(message))
                elif message["say"] == "done":
                    self._heard.finish(rank)

    def _failed(self, failure: Failure) -> None:
        """Note a failure; runs in the thread that listens."""
        if self._heard.fail(failure) and not self._heard.ending:
            threading.Thread(target=self._stop, args=(failure,), daemon=True).start()

    def _stop(self, failure: Failure) -> None:
        """End the main thread's work, unless it ends by itself."""
        heard = self._heard
        if heard.busy:
            # A collective that lost a process raises, as a rule.
            time.sleep(STUCK_S)
            if heard.busy and not self.place.cluster:
                print(f"rank {failure.rank}: {failure.text}", file=sys.stderr, flush=True)
                os._exit(1)
        else:
            time.sleep(SETTLE_S)  # Ctrl-C reaches all: this process may be on its way out, too
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

    failures: dict[int, Failure] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    hung_up: set[int] = field(default_factory=set)
    busy: bool = False
    ending: bool = False

    def begin(self) -> None:
        self.done.clear()
        self.busy = True

    def fail(self, failure: Failure) -> bool:
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
def leader(place: Place) -> Leader:
    """Return rank 0's lines, made at the first call."""
    store = open_store(place)
    return Leader(place, store, await_members(store, place.processes))


@cache
def member(place: Place) -> tuple[Member, Store]:
    """Return another process's line and store, made at the first call."""
    store = open_store(place)
    return Member(call_leader(store, place.address, place.rank), place), store
