"""Sends runs that were recorded offline to W&B.

Each start of a run writes a transaction log of its own; a resumed start repeats the rows after its
checkpoint. W&B's history is append-only, so of each log the rows are sent that no later log has and
that have not been sent yet. `wandb sync` sends them, from a copy of the log with these rows.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_exp.redaction import without_secrets
from rlhf_exp.tracking.local import METRICS, STEP, note_url, noted_url, read_metrics
from rlhf_exp.tracking.wandb_log import (
    RUN_VARIABLES,
    StartNote,
    copy_log,
    copy_rows,
    is_complete,
    mark_synced,
    read_wandb_file,
    synced_marker,
    wandb_files,
)

SYNC_TIMEOUT_S = 1800.0
API_TIMEOUT_S = 20
_LAST = "last_step"
REPORT_FILE = "report.html"
_RUN_PATH = re.compile(r"/([^/]+)/([^/]+)/runs/([^/?#]+)")
_URL = re.compile(r"View run .*?\b(https?://\S+)")
# By default `wandb sync` retries for hours; the user can give the command again.
_ENVIRONMENT = {
    "WANDB_X_GRAPHQL_RETRY_MAX": "3",
    "WANDB_X_FILE_TRANSFER_RETRY_MAX": "3",
    "WANDB_ERROR_REPORTING": "false",
}


@dataclass(frozen=True)
class RunStart:
    """One start of a run.

    Attributes:
        path: Its transaction log.
        run_id: The run's id.
        project: Its project.
        entity: Its user or team; "" is the account's default.
        online: Whether it was connected to a server.
        complete: Whether it was finished.
        steps: The global steps of its rows.
        sent: Its last step that was sent; `None`: it has not been sent.
        first: The first step that it ran itself; `None`: not noted, so the lowest of its rows.
        rows: Rows to send that no log holds, by a further log of this start; `None` for a start.
    """

    path: Path
    run_id: str
    project: str
    entity: str
    online: bool
    complete: bool
    steps: tuple[int, ...]
    sent: float | None
    first: float | None = None
    rows: tuple[Mapping[str, float], ...] | None = None


@dataclass(frozen=True)
class SyncPiece:
    """The rows of a start to send: those with `after < step < before`."""

    start: RunStart
    after: float
    before: float

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is to be sent; a row without a step always is."""
        return STEP not in row or self.after < row[STEP] < self.before

    @property
    def steps(self) -> list[int]:
        """The steps that are sent."""
        return [step for step in self.start.steps if self.after < step < self.before]

    @property
    def last(self) -> float:
        """The last step that is sent."""
        return max(self.steps, default=-1)


@dataclass(frozen=True)
class SyncResult:
    """The outcome of sending a piece.

    Attributes:
        url: Address of the run's page.
        error: The error; `None` if the piece was sent.
    """

    url: str
    error: str | None


def starts_of(folder: Path) -> list[RunStart]:
    """Return the starts recorded in a run's folder, in order.

    Rows of `metrics.jsonl` that no log holds, because W&B's process was killed, follow as a last
    start.

    Raises:
        UserError: A log is damaged.
    """
    starts = []
    for path in wandb_files(folder):
        if path.stat().st_size <= 7:  # killed before anything was written
            continue
        run = read_wandb_file(path)
        steps = tuple(row[STEP] for row in run.history if STEP in row)
        online = not path.parent.name.startswith("offline-")
        sent = _last_sent(path, steps)
        names = run.run_id, run.project, run.entity
        first = StartNote.read(path).first
        starts.append(RunStart(path, *names, online, is_complete(path), steps, sent, first))
    if starts and (folder / METRICS).is_file():
        held = {step for start in starts for step in start.steps}
        sent = max((start.sent for start in starts if start.sent is not None), default=-math.inf)
        rows = tuple(
            row
            for row in read_metrics(folder / METRICS)
            if row[STEP] not in held and row[STEP] > sent
        )
        if rows:
            steps = tuple(int(row[STEP]) for row in rows)
            starts.append(
                replace(starts[-1], online=False, steps=steps, sent=None, first=None, rows=rows)
            )
    return starts


def _last_sent(path: Path, steps: tuple[int, ...]) -> float | None:
    marker = synced_marker(path)
    if not marker.exists():
        return None
    note = marker.read_text(encoding="utf-8", errors="replace")
    if not note:  # `wandb sync` itself writes none: it has sent everything
        return max(steps, default=-1)
    try:
        return float(json.loads(note)[_LAST])
    except (ValueError, KeyError, TypeError):  # damaged: the server knows what it has
        return None


def unsent(starts: Sequence[RunStart], after: float = -math.inf) -> list[SyncPiece]:
    """Return the pieces to send, in order.

    A start that was online has first sent all that the starts before it recorded, so these are
    skipped.

    Args:
        starts: In order.
        after: The last step that the server has (see `last_step_sent`).
    """
    connected = [index for index, start in enumerate(starts) if start.online and start.steps]
    begin = connected[-1] if connected else 0
    pieces = []
    for index in range(begin, len(starts)):
        start = starts[index]
        if start.sent is not None:
            after = max(after, start.sent)
        elif start.steps or not start.online:  # else no server answered: an offline start followed
            later = [
                min(other.steps) if other.first is None else other.first
                for other in starts[index + 1 :]
                if other.steps and other.rows is None
            ]
            piece = SyncPiece(start, after, min(later, default=math.inf))
            if start.rows is not None and not piece.steps:
                continue
            pieces.append(piece)
            after = max(after, piece.last)
    return pieces


def last_step_sent(starts: Sequence[RunStart]) -> float:
    """Ask W&B for the last step that it has of a run.

    If the connection was lost, the server has a part of a log, and only it knows which. Its summary
    may be ahead of its rows; their number may include rows sent twice by other means.

    Raises:
        Exception: The server does not answer, or with an error; the client raises many classes.
    """
    from rlhf_exp.tracking.wandb_tracker import wandb

    api = wandb.Api(timeout=API_TIMEOUT_S)
    entity = starts[0].entity or api.default_entity
    try:
        run = api.run(f"{entity}/{starts[0].project}/{starts[0].run_id}")
    except wandb.errors.CommError as error:
        if isinstance(error.exc, wandb.apis.public.RunNotFoundError):
            return -math.inf
        raise
    steps = sorted({step for start in starts for step in start.steps})
    count, last = run.history_line_count, run.summary.get(STEP)
    if not count or not steps or last is None:
        return -math.inf
    return float(min(last, steps[min(count, len(steps)) - 1]))


def send(piece: SyncPiece, folder: Path) -> SyncResult:
    """Send a piece by `wandb sync`, from a copy of its log.

    Args:
        piece: The rows to send.
        folder: The run's folder.
    """
    path = piece.start.path
    with TemporaryDirectory(prefix="wandb-sync-") as workspace:
        copy = Path(workspace) / path.parent.name
        files = path.parent / "files"
        if files.is_dir():
            shutil.copytree(files, copy / "files")
        copy.mkdir(exist_ok=True)
        if piece.start.rows is None:
            copy_log(path, copy / path.name, piece.keeps, folder.resolve())
        else:
            copy_rows(path, copy / path.name, [row for row in piece.start.rows if piece.keeps(row)])
        output = _wandb_sync(copy)
        sent = synced_marker(copy / path.name).exists()
    if not sent:
        return SyncResult("", _reason(output))
    mark_synced(path, json.dumps({_LAST: piece.last}))
    url = _URL.search(output)
    if url:
        note_url(folder, url[1])
    return SyncResult(url[1] if url else "", None)


def attach_report(folder: Path, report: Path) -> str | None:
    """Upload a report to a run that W&B has, as its file `report.html`.

    Args:
        folder: The run's folder, which notes its address.
        report: The page.

    Returns:
        The reason why it is not there; `None` if it is, or W&B does not have the run.
    """
    from rlhf_exp.tracking.wandb_tracker import wandb

    url = noted_url(folder)
    names = None if url is None else _RUN_PATH.search(url)
    if names is None:
        return None
    with TemporaryDirectory(prefix="wandb-report-") as workspace:
        copy = Path(workspace) / REPORT_FILE
        shutil.copyfile(report, copy)
        try:
            run = wandb.Api(timeout=API_TIMEOUT_S).run("/".join(names.groups()))
            run.upload_file(str(copy), root=workspace)
        except Exception as error:  # of `requests`, and several families of W&B's own
            return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    return None


def _wandb_sync(folder: Path) -> str:
    """Run `wandb sync` on a start's directory; return its output. Its exit code is always 0."""
    kept = {name: value for name, value in os.environ.items() if name not in RUN_VARIABLES}
    environment = {**kept, **_ENVIRONMENT}
    environment.pop("WANDB_SILENT", None)
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)]
    try:
        process = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SYNC_TIMEOUT_S,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"wandb sync took more than {SYNC_TIMEOUT_S:g} s"
    return process.stdout


def _reason(output: str) -> str:
    """Return the line of `wandb sync` that names the error."""
    lines = [line.removeprefix("wandb: ").strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(?i)error|fail|not auth|took more", line)]
    return without_secrets((errors or lines or ["wandb sync said nothing"])[-1])
