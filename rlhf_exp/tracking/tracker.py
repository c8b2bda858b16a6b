"""The `Tracker` protocol: a stage's reports of metrics, tables, results and alerts.

The step axis is `global_step` everywhere. Only the process of rank 0 opens a tracker (`create.py`);
the others use `NullTracker`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf_exp.redaction import redacted, without_secrets
from rlhf_exp.signals import (
    HUNG_UP,
    INTERRUPTED,
    TERMINATED,
    ending_signals,
    exit_on_signal,
)
from rlhf_exp.tracking.alerts import AlertMonitor


class Tracker(Protocol):
    """Receives the metrics, tables and results of a stage's run.

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
            more: Whether more metrics of this step will follow, so that its row does not end yet.
        """

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Record a histogram of `values`, as a part of the row that `log` will end."""

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
            text: The observation, and a remedy.
            step: The global step of the observation.
        """

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """Record by reference that the run has made a model: nothing is uploaded.

        Args:
            name: The model's name.
            path: The folder or file that contains it now.
            final_path: The path to which it will be moved.
            metadata: Facts about it, its digest among them.
        """

    def mark_preempting(self) -> None:
        """Record that the run is being stopped and will be started again."""

    def finish(self, exit_code: int = 0) -> None:
        """Write everything and close; further calls do nothing."""


class NullTracker:
    """The tracker of a process that reports nothing: all but the one of rank 0."""

    run_id = ""

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """Do nothing."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Do nothing."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def alert(self, title: str, text: str, step: int) -> None:
        """Do nothing."""

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """Do nothing."""

    def mark_preempting(self) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class CompositeTracker:
    """Reports to several trackers, in order and without secrets, and raises alerts.

    Args:
        trackers: The trackers; the first has the run's id.
        alerts: Checks each row.
    """

    def __init__(self, *trackers: Tracker, alerts: AlertMonitor | None = None) -> None:
        self.run_id = trackers[0].run_id
        self._trackers = trackers
        self._alerts = alerts or AlertMonitor()

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log(metrics, step, more=more)
        for title, text in self._alerts.check(metrics):
            self.alert(title, text, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.histogram(name, values, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""
        rows = redacted(rows)
        for tracker in self._trackers:
            tracker.table(name, columns, rows, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        values = redacted(dict(values))
        for tracker in self._trackers:
            tracker.summary(values)

    def alert(self, title: str, text: str, step: int) -> None:
        """See `Tracker`."""
        text = without_secrets(text)
        for tracker in self._trackers:
            tracker.alert(title, text, step)

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.model(name, path, final_path, metadata)

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.finish(exit_code)


@contextmanager
def finishing(tracker: Tracker) -> Iterator[Tracker]:
    """Finish `tracker` however the block ends: done, failed, interrupted or terminated.

    A run that is not finished is shown as running or crashed, loses its last rows, and is shared
    with the next job of the same process.

    The exit code is 0 at the end of the block, 1 for an exception, 130 for Ctrl-C, and that of a
    `SystemExit`. After 129, 130 and 143 the run is marked as preempted: it will be continued.

    SIGTERM and SIGHUP are turned into `SystemExit` inside the block, so that the work unwinds to
    here instead of W&B being called from a signal handler. A handler that has been set before (one
    that writes a checkpoint first) stays; it should end in `SystemExit`.
    """
    handled = ending_signals()
    for number in handled:
        signal.signal(number, exit_on_signal)
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
        for number in handled:  # a second signal must not cut off the writing
            signal.signal(number, signal.SIG_IGN)
        try:
            if code in (INTERRUPTED, TERMINATED, HUNG_UP):
                tracker.mark_preempting()
            tracker.finish(code)
        finally:
            for number in handled:
                signal.signal(number, signal.SIG_DFL)
