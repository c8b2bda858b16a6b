"""Where a stage reports to: the `Tracker` protocol.

The step axis is `global_step` everywhere. Only the process of rank 0 opens a tracker
(`opening.py`); the others use `NullTracker`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


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
