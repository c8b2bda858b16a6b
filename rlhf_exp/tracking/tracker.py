"""Where a stage reports to: the `Tracker` protocol.

The step axis is `global_step` everywhere. Only the process of rank 0 opens a tracker
(`opening.py`); the others use `NullTracker`.

The tracker of a run that is recorded in several places, and watched.

Closing a tracker however the work ends: done, failed, interrupted or told to stop.

A run that is not finished is shown as running or crashed, loses its last rows, and is shared with
the next job of the same process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from rlhf_exp.tracking.alerts import AlertMonitor


class Tracker(Protocol):
    """What a stage may say about its run.

    Attributes:
        run_id: The run's id, the same after a resume (and at W&B).
    """

    run_id: str

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """Record scalars at global step `step`, and end the step's row.

        Log a step before its checkpoint is written: a resume keeps the rows up to and including
        the checkpoint's step.

        Args:
            metrics: Numbers by name.
            step: The global step.
            more: Whether more of this step will be logged, so that its row does not end yet.
        """

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Record how `values` are distributed, as a part of the row that `log` will end."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Record a table, as a part of the row that `log` will end.

        Cells are text, numbers, booleans or None.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the run's results: numbers or text, not a curve."""

    def alert(self, title: str, text: str, step: int) -> None:
        """Tell people that something needs their attention.

        Args:
            title: A few words.
            text: What was seen and what can be done.
            step: The global step at which it was seen.
        """

    def model(self, name: str, made: Path, place: Path, facts: Mapping[str, Any]) -> None:
        """Record that the run has made a model, by reference: nothing is uploaded.

        Args:
            name: The model's name.
            made: The folder or file where it is now.
            place: Where it will be.
            facts: What is known of it; its digest among them.
        """

    def mark_preempting(self) -> None:
        """Say that the run is being stopped and will be started again."""

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out and close; further calls of it do nothing."""


class NullTracker:
    """The tracker of a process that has nothing to report."""

    run_id = ""

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """Nothing."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Nothing."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def alert(self, title: str, text: str, step: int) -> None:
        """Nothing."""

    def model(self, name: str, made: Path, place: Path, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def mark_preempting(self) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


class CompositeTracker:
    """The tracker that reports to each of `trackers`, in order, and raises alarms.

    Args:
        trackers: Where to report to; the first knows the run's id.
        alarms: Look at each row.
    """

    def __init__(self, *trackers: Tracker, alarms: AlertMonitor | None = None) -> None:
        self.run_id = trackers[0].run_id
        self._trackers = trackers
        self._alarms = alarms or AlertMonitor()

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log(metrics, step, more=more)
        for title, text in self._alarms.see(metrics):
            self.alert(title, text, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.histogram(name, values, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.summary(values)

    def alert(self, title: str, text: str, step: int) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.alert(title, text, step)

    def model(self, name: str, made: Path, place: Path, facts: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.model(name, made, place, facts)

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.finish(exit_code)


INTERRUPTED = 130  # what shells report for a process that SIGINT ended
TERMINATED = 143  # ... SIGTERM


@contextmanager
def finishing(tracker: Tracker) -> Iterator[Tracker]:
    """Finish `tracker` at the end of the block, with the exit code that the end deserves.

    0 at the end of the block, 1 for an exception, 130 for Ctrl-C, the code of a `SystemExit`. After
    130 and 143 the run is marked as preempted: it will be continued.

    SIGTERM is turned into `SystemExit(143)` inside the block, so that the work unwinds to here
    instead of W&B being called from a handler, in the middle of anything. A handler that somebody
    else has set (one that writes a checkpoint first) stays; it should end in `SystemExit(143)`.
    """
    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if in_charge:
        signal.signal(signal.SIGTERM, _terminate)
    code = 1
    try:
        yield tracker
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if in_charge:  # an impatient second signal must not cut off the writing
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if code in (INTERRUPTED, TERMINATED):
                tracker.mark_preempting()
            tracker.finish(code)
        finally:
            if in_charge:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
