"""The `Tracker` that writes TensorBoard's event files, to `tensorboard/` in the run's folder.

`tensorboard --logdir OUTPUTS/store` shows the runs of all stages. Each row is flushed, so that a
kill loses none. A resume appends a file that begins at the step after the checkpoint: TensorBoard
drops what an earlier file has from that step on, so no step is shown twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.charts import chart_name

FOLDER = "tensorboard"
ROWS = 20
"""Rows of a table that are shown: all of them are in `tables/`."""
_CELL = 1000


class TensorBoardTracker:
    """Writes scalars, histograms, and tables, summaries and alerts as text.

    Args:
        folder: The run's folder.
        run_id: The run's id, for `Tracker.run_id`.
        stage: The stage, which begins the names of metrics that several stages log.
        name: The run's name for people.
        config: The resolved config, nested, without secrets.
        resume_step: The last global step that is part of the state being resumed; `None` starts
            anew.

    Raises:
        UserError: The package tensorboard is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        stage: str | None,
        name: str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tracking.also=[tensorboard]: needs tensorboard ({error}): `pip install "
                "tensorboard` (extra `tensorboard`)"
            ) from error
        self.run_id, self._stage = run_id, stage
        path = folder / FOLDER
        if resume_step is None:
            shutil.rmtree(path, ignore_errors=True)
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(path), purge_step=purge)
        self._last = resume_step or 0
        self._closed = False
        if resume_step is None:
            self._text("run", f"{name} ({run_id})", 0)
            self._text("config", _code(json.dumps(config, indent=1, default=str)), 0)
            self._writer.flush()

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """See `Tracker`."""
        self._last = step
        for name, value in metrics.items():
            self._writer.add_scalar(chart_name(self._stage, name), float(value), step)
        self._writer.flush()

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """See `Tracker`. Values that are not finite are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if finite.size:
            self._writer.add_histogram(chart_name(self._stage, name), finite, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""
        lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows[:ROWS])]
        if len(rows) > ROWS:
            lines.append(f"\n{len(rows) - ROWS} more rows are in tables/")
        self._text(chart_name(self._stage, name), "\n".join(lines), step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._text("summary", _code(json.dumps(values, indent=1, default=str)), self._last)

    def alert(self, title: str, text: str, step: int) -> None:
        """See `Tracker`."""
        self._text("alerts", f"**{title}** at step {step}: {text}", step)

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """Do nothing: TensorBoard has no models."""

    def mark_preempting(self) -> None:
        """Do nothing: TensorBoard has no states of runs."""

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        # Half a character, as models write, is no UTF-8.
        self._writer.add_text(name, text.encode("utf-8", "replace").decode("utf-8"), step)


def _row(cells: Sequence[Any]) -> str:
    """Return a row of a Markdown table; TensorBoard makes markup in it harmless."""
    texts = (text if len(text) <= _CELL else f"{text[:_CELL]}…" for text in map(str, cells))
    escaped = (text.replace("|", "\\|").replace("\n", " ") for text in texts)
    return f"| {' | '.join(escaped)} |"


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
