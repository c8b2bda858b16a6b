"""The local record of a run: `metrics.jsonl`, `tables/` and `summary.json` in the run's folder.

It is written with or without W&B, needs no library to read, and is the source of reports.

- `metrics.jsonl`: one row per `log`, `{"global_step": 12, "reward/mean": 0.5, ...}`, handed to the
  operating system at once: a killed process loses no finished row. JSON has no non-finite numbers,
  so they stand as the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back.
- `tables/<name>-<step>.jsonl`: one object per row. Cells may be text, so a non-finite number
  becomes null there (the text "NaN" stays text).
- `alerts.jsonl`: one alert a line, with its `global_step`, title and text.
- `summary.json`: the last value of everything given to `summary`.

Histograms and references to models are for W&B only.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_text_atomic

log = logging.getLogger(__name__)

STEP = "global_step"
METRICS, ALERTS = "metrics.jsonl", "alerts.jsonl"
URL = "wandb_url"
"""File with the address of a run's page at W&B, if it has one."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PAGE = re.compile(r"https?://[^\s\"'<>]+")
_TABLE_NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*")


class MetricsLog:
    """The `Tracker` that writes a run's local record.

    Args:
        folder: The run's folder; created if missing.
        run_id: The run's id, for `Tracker.run_id`; not written.
        resume_step: The last global step that is part of the state being resumed: later rows and
            tables are removed, because they will be logged again. None removes all of them.
    """

    def __init__(self, folder: Path, *, run_id: str = "", resume_step: int | None = None) -> None:
        self.run_id = run_id
        self._folder = folder
        self._summary: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._rewind(-math.inf if resume_step is None else resume_step)
        self._file = open(folder / METRICS, "ab", buffering=0)  # noqa: SIM115

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """Append one row. Several rows of one step are merged by `read_metrics`."""
        row = {STEP: step} | {name: _number(value) for name, value in metrics.items()}
        line = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
        while line:  # an unbuffered write may be short
            line = line[self._file.write(line) :]

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Do nothing: histograms are for W&B only."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Write `tables/<name>-<step>.jsonl`; a table of the same name and step is replaced.

        Raises:
            ValueError: The name is not words of letters, digits and `_` joined by `/`.
        """
        path = _table_path(self._folder, name, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (dict(zip(columns, map(_cell, row), strict=True)) for row in rows)
        _write_lines(path, (json.dumps(line, allow_nan=False) for line in lines))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merge values into `summary.json`."""
        self._summary |= {name: _cell(value) for name, value in values.items()}
        text = json.dumps(self._summary, indent=1, allow_nan=False)
        _write_lines(self._folder / "summary.json", [text])

    def alert(self, title: str, text: str, step: int) -> None:
        """Append to `alerts.jsonl`, and log a warning."""
        log.warning("alert at step %d: %s: %s", step, title, text)
        with open(self._folder / ALERTS, "a", encoding="utf-8") as file:
            file.write(json.dumps({STEP: step, "title": title, "text": text}) + "\n")

    def model(self, name: str, path: Path, final_path: Path, metadata: Mapping[str, Any]) -> None:
        """Do nothing: the artifact's manifest describes the model."""

    def mark_preempting(self) -> None:
        """Do nothing: the record is complete at any moment."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()

    def _rewind(self, last_step: float) -> None:
        """Remove rows and tables logged after `last_step`, and a line torn by a kill."""
        for path in (self._folder / METRICS, self._folder / ALERTS):
            if path.exists():
                rows = [(line, row[STEP]) for line, row in _complete_rows(path)]
                _write_lines(path, (line for line, step in rows if step <= last_step))
        if last_step == -math.inf:
            shutil.rmtree(self._folder / "tables", ignore_errors=True)
            (self._folder / "summary.json").unlink(missing_ok=True)
            return
        for table in (self._folder / "tables").rglob("*-*.jsonl"):
            if _step_of(table) > last_step:
                table.unlink()
        if (self._folder / "summary.json").exists():
            self._summary = self._read_summary()

    def _read_summary(self) -> dict[str, Any]:
        path = self._folder / "summary.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            reason = "no values by name"
        except ValueError as error:
            reason = str(error)
        log.warning("%s is damaged (%s): the summary is begun anew", path, reason)
        return {}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl`: one row per `global_step`, in order of steps.

    Rows of one step are merged, and of a metric logged twice there the last value counts. A last
    line that a kill cut short is left out.

    Raises:
        UserError: A line other than the last is not a row; names file and line.
    """
    merged: dict[int, dict[str, float]] = {}
    for _, row in _complete_rows(path):
        numbers = {name: _NON_FINITE.get(value, value) for name, value in row.items()}
        merged.setdefault(row[STEP], {}).update(numbers)
    return [merged[step] for step in sorted(merged)]


def read_table(folder: Path, name: str, step: int | None = None) -> list[dict[str, Any]]:
    """Read a table's rows from a run's folder: those of `step`, or of its latest step.

    Raises:
        FileNotFoundError: The run has no such table.
    """
    if step is None:
        steps = table_steps(folder, name)
        if not steps:
            raise FileNotFoundError(f"no table {name!r} in {folder / 'tables'}")
        step = steps[-1]
    text = _table_path(folder, name, step).read_text()
    return [json.loads(line) for line in text.splitlines()]


def table_steps(folder: Path, name: str) -> list[int]:
    """Return the steps at which a run's table was written, ascending."""
    pattern = _table_path(folder, name, 0)
    tables = pattern.parent.glob(f"{pattern.name.removesuffix('-0.jsonl')}-*.jsonl")
    return sorted(map(_step_of, tables))


def _complete_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return each complete line of `path` with its row."""
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or a torn line
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row[STEP] + 0  # fails unless the step is a number
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: expected a JSON object with {STEP!r}, found {line[:80]!r}. "
                "The file was edited or damaged: remove that line."
            ) from error
        rows.append((line.decode(), row))
    return rows


def _number(value: float) -> int | float | str:
    """Return a metric as JSON can hold it; it may be anything that converts to float."""
    number = value if isinstance(value, int) else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _cell(value: object) -> object:
    """Return a table cell as JSON can hold it."""
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)  # type: ignore[arg-type] # anything else must be a number
    return number if math.isfinite(number) else None


def _table_path(folder: Path, name: str, step: int) -> Path:
    if not _TABLE_NAME.fullmatch(name):
        raise ValueError(f"table name {name!r}: expected words of letters, digits, _ joined by /")
    return folder / "tables" / f"{name}-{step}.jsonl"


def _step_of(table: Path) -> int:
    return int(table.stem.rpartition("-")[2])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text_atomic(path, "".join(line + "\n" for line in lines))


def note_url(folder: Path, url: str) -> None:
    """Note the address of a run's page at W&B in the run's folder."""
    if noted_url(folder) != url:
        write_text_atomic(folder / URL, f"{url}\n", durable=False)


def noted_url(folder: Path) -> str | None:
    """Return the address of a run's page at W&B; `None` if none is noted."""
    try:
        url = (folder / URL).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return None
    return url if _PAGE.fullmatch(url) else None
