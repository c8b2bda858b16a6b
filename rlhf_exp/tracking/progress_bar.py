"""The progress of a stage on standard error: a bar with a few metrics beside it.

On a terminal the bar is live; elsewhere (a log file, a cluster job) it is a line every 10 s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINE_INTERVAL_S = 10.0


class StageProgress:
    """Context manager that shows how far a stage is.

    Args:
        stage: The name in front, such as "ppo".
        total: The step at which the stage is done.
        watch: The metrics to show, by name; those not logged yet are left out.
        start: The step already done, on a resume: the time left is estimated from the steps since.
        shown: False shows nothing (processes other than rank 0).
        stream: The output; standard error by default.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        watch: Sequence[str],
        *,
        start: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._watch = stage, total, tuple(watch)
        self._start = self._step = start
        self._shown = shown
        self._stream = stream or sys.stderr
        self._clock = clock
        self._values: dict[str, float] = {}
        self._bar = self._make_bar() if shown and self._stream.isatty() else None
        self._began = clock()
        self._printed_at = self._began
        self._printed_step = -1

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done; watched metrics missing here keep their last value."""
        self._step = step
        self._values |= {name: float(metrics[name]) for name in self._watch if name in metrics}
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=self._numbers())
        elif self._shown and self._clock() - self._printed_at >= LINE_INTERVAL_S:
            self._print_line()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and self._step != self._printed_step:
            self._print_line()

    def _make_bar(self) -> RichProgress:
        bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        bar.add_task(self._stage, total=self._total, completed=self._start, numbers="")
        return bar

    def _numbers(self) -> str:
        return "  ".join(f"{k} {self._values[k]:.4g}" for k in self._watch if k in self._values)

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = self._clock(), self._step
        elapsed = self._printed_at - self._began
        done = self._step - self._start
        parts = [f"{self._stage} {self._step}/{self._total}", self._numbers(), _clock_time(elapsed)]
        if done > 0 and self._step < self._total:
            parts.append(f"{_clock_time(elapsed / done * (self._total - self._step))} left")
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)


def _clock_time(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
