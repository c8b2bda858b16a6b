"""The tracker of a run that is recorded in several places, and watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.tracking.alerts import Alarms
from rlhf_exp.tracking.tracker import Tracker


class Several:
    """The tracker that reports to each of `trackers`, in order, and raises alarms.

    Args:
        trackers: Where to report to; the first knows the run's id.
        alarms: Look at each row.
    """

    def __init__(self, *trackers: Tracker, alarms: Alarms | None = None) -> None:
        self.run_id = trackers[0].run_id
        self._trackers = trackers
        self._alarms = alarms or Alarms()

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
