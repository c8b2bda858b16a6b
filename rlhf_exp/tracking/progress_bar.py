"""The progress of a stage on standard error: step, time left and a few metrics.

On a terminal it is one live line that fits 80 columns, elsewhere (a log file, a cluster job) a line
every 10 s. The same lines go to the run's log. `progress.json` in the stage's folder tells other
processes, such as `rlhf-exp status`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, Task
from rich.text import Text

from rlhf_exp.run_log import append
from rlhf_exp.store.atomic_files import write_json_atomic

LINE_INTERVAL_S = 10.0
FILE_INTERVAL_S = 2.0
PROGRESS_FILE = "progress.json"
_BAR, _SHORTEST_BAR = 24, 6
# Names as a line of 80 columns has room for; others are shown as they are.
_LABELS = {
    "loss/total": "loss {}",
    "eval/loss": "val. loss {}",
    "eval/accuracy": "val. accuracy {}",
    "reward/accuracy": "accuracy {}",
    "dpo/accuracy": "accuracy {}",
    "reward/mean": "reward {}",
    "eval/reward_mean": "reward {}",
    "kl/sequence": "KL {}",
    "eval/kl_sequence": "KL {}",
    "throughput/samples_per_s": "{} samples/s",
    "throughput/tokens_per_s": "{} tokens/s",
}


@dataclass(frozen=True)
class Progress:
    """How far a stage is, as `progress.json` tells it.

    Attributes:
        label: What is done: the stage, or the part of an evaluation.
        step: Steps done.
        steps: All of them.
        seconds_left: Until the last step; `None` before it can be estimated.
        numbers: The watched metrics by name.
        time: When this was written, in seconds since 1970.
    """

    label: str
    step: int
    steps: int
    seconds_left: float | None
    numbers: dict[str, float]
    time: float

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the progress of the stage that works in a folder; `None` if it tells none."""
        try:
            return cls(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class StageProgress:
    """Context manager that shows how far a stage is.

    Args:
        stage: The name in front, such as "ppo".
        total: The step at which the stage is done.
        watch: The metrics to show, by name; those not logged yet are left out.
        shown: False shows nothing (processes other than rank 0).
        folder: The stage's folder, for `progress.json`; `None` writes none.
        log: The run's log, if it has one.
        stream: The output; standard error by default.
        clock: Returns seconds; for tests.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        watch: Sequence[str],
        *,
        shown: bool = True,
        folder: Path | None = None,
        log: str | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._watch = stage, total, tuple(watch)
        self._start = self._step = 0
        self._shown, self._log = shown, log
        self._file = None if folder is None or not shown else folder / PROGRESS_FILE
        self._stream = stream or sys.stderr
        self._clock = clock
        self._values: dict[str, float] = {}
        self._bar = self._make_bar() if shown and self._stream.isatty() else None
        self._began = self._updated = self._printed_at = clock()
        self._saved_at = -FILE_INTERVAL_S
        self._printed_step = -1

    def __enter__(self) -> Self:
        """Show the line."""
        if self._bar is not None:
            self._bar.start()
        self._save()
        return self

    def begin(self, step: int) -> None:
        """Note that `step` steps were done before: the time left is that of the steps since."""
        self._start = self._step = step
        self._began = self._updated = self._clock()
        self._save()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done; watched metrics missing here keep their last value."""
        self._step, self._updated = step, self._clock()
        self._values |= {name: float(metrics[name]) for name in self._watch if name in metrics}
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        if self._updated - self._printed_at >= LINE_INTERVAL_S:
            self._print_line()
        if self._updated - self._saved_at >= FILE_INTERVAL_S:
            self._save()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
        if self._step != self._printed_step:
            self._print_line()
        self._save()

    def text(self, width: int | None = None) -> str:
        """Return the line: `ppo 120/480  12:30 left  reward 1.23  KL 3.4  12 samples/s`.

        Args:
            width: Columns; a bar fills what the words leave. `None`: no bar.
        """
        left = self._seconds_left()
        if left is None:
            time_words = f"{_clock_time(self._clock() - self._began)} so far"
        elif self._step >= self._total:
            time_words = f"in {_clock_time(self._updated - self._began)}"
        else:
            time_words = f"{_clock_time(left)} left"
        parts = [f"{self._step}/{self._total}", time_words, *self._numbers()]
        words = "  ".join(parts)
        room = 0 if width is None else min(_BAR, width - len(self._stage) - len(words) - 3)
        if room < _SHORTEST_BAR:
            return f"{self._stage} {words}"
        done = round(room * min(1.0, self._step / self._total)) if self._total else room
        return f"{self._stage} {'━' * done}{'╌' * (room - done)} {words}"

    def _make_bar(self) -> RichProgress:
        console = Console(file=self._stream)
        bar = RichProgress(_Line(self, console), console=console)
        bar.add_task(self._stage, total=self._total)
        return bar

    def _seconds_left(self) -> float | None:
        """Return the seconds left, by the mean time of a step since the beginning."""
        done = self._step - self._start
        if done <= 0:
            return None
        left = (self._updated - self._began) / done * (self._total - self._step)
        return max(0.0, left - (self._clock() - self._updated))

    def _numbers(self) -> list[str]:
        return [
            _LABELS.get(name, f"{name} {{}}").format(f"{self._values[name]:.4g}")
            for name in self._watch
            if name in self._values
        ]

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = self._updated, self._step
        if not self._shown:
            return
        line = self.text()
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        if self._log is not None:
            append(self._log, line)

    def _save(self) -> None:
        """Write `progress.json`; a full disk stops what matters, and says so itself."""
        self._saved_at = self._updated
        if self._file is None:
            return
        progress = Progress(
            self._stage,
            self._step,
            self._total,
            self._seconds_left(),
            dict(self._values),
            time.time(),
        )
        with suppress(OSError):
            write_json_atomic(self._file, asdict(progress), durable=False)


class _Line(ProgressColumn):
    """The live line, at most as wide as the terminal."""

    def __init__(self, progress: StageProgress, console: Console) -> None:
        super().__init__()
        self._progress, self._console = progress, console

    def render(self, task: Task) -> Text:
        """Return the line as it is now."""
        width = self._console.width
        return Text(self._progress.text(width)[:width], no_wrap=True)


def _clock_time(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
