"""Sending to W&B what a run has recorded offline, over all its starts.

Each start of a run writes a transaction log of its own; a resumed start logs again what came after
its checkpoint. W&B's history only grows, so what is sent of a log are the rows that no later log
has and that have not been sent yet. `wandb sync` does the sending, from a copy with these rows.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_exp.tracking.local import STEP
from rlhf_exp.tracking.wandb_log import (
    copy_log,
    is_complete,
    mark_synced,
    read_wandb_file,
    synced_marker,
    wandb_files,
)

TIMEOUT_S = 1800.0
ASK_S = 20
_LAST = "last_step"
_URL = re.compile(r"View run .*?\b(https?://\S+)")
# Its own patience is hours; the user can give the command again.
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
        sent: The last step sent of it; `None`: it has not been sent.
    """

    path: Path
    run_id: str
    project: str
    entity: str
    online: bool
    complete: bool
    steps: tuple[int, ...]
    sent: float | None


@dataclass(frozen=True)
class SyncPiece:
    """What is to be sent of a start: its rows with `after < step < before`."""

    start: RunStart
    after: float
    before: float

    def keeps(self, row: dict[str, Any]) -> bool:
        """Whether a row is to be sent; what is no step's always is."""
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
    """How sending went.

    Attributes:
        url: Where the run is to be seen.
        error: What went wrong; `None`: nothing.
    """

    url: str
    error: str | None


def starts_of(folder: Path) -> list[RunStart]:
    """Return the starts recorded in a run's folder, in order.

    Raises:
        UserError: A log is damaged.
    """
    found = []
    for path in wandb_files(folder):
        if path.stat().st_size <= 7:  # killed before anything was written
            continue
        run = read_wandb_file(path)
        steps = tuple(row[STEP] for row in run.history if STEP in row)
        online = not path.parent.name.startswith("offline-")
        sent = _last_sent(path, steps)
        whose = run.run_id, run.project, run.entity
        found.append(RunStart(path, *whose, online, is_complete(path), steps, sent))
    return found


def _last_sent(path: Path, steps: tuple[int, ...]) -> float | None:
    marker = synced_marker(path)
    if not marker.exists():
        return None
    note = marker.read_text(encoding="utf-8")
    # `wandb sync` itself writes no note: it has sent everything.
    return float(json.loads(note)[_LAST]) if note else max(steps, default=-1)


def unsent(starts: Sequence[RunStart], after: float = -math.inf) -> list[SyncPiece]:
    """Return what is to be sent, in order.

    A start that was online has first sent whatever the starts before it had recorded, so these are
    done with.

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
        elif start.steps or not start.online:  # else the server was away: an offline one followed
            later = [min(one.steps) for one in starts[index + 1 :] if one.steps]
            piece = SyncPiece(start, after, min(later, default=math.inf))
            pieces.append(piece)
            after = max(after, piece.last)
    return pieces


def last_step_sent(starts: Sequence[RunStart]) -> float:
    """Ask W&B for the last step that it has of a run.

    A server lost in the middle has a part of what a log holds, and only it knows which. Its summary
    may be ahead of its rows; their number may include rows sent twice by other means.

    Raises:
        wandb.Error: The server does not say.
    """
    from rlhf_exp.tracking.wandb_log import wandb

    api = wandb.Api(timeout=ASK_S)
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
        piece: What is sent.
        folder: The run's folder.
    """
    path = piece.start.path
    with TemporaryDirectory(prefix="wandb-sync-") as workspace:
        copy = Path(workspace) / path.parent.name
        files = path.parent / "files"
        if files.is_dir():
            shutil.copytree(files, copy / "files")
        copy.mkdir(exist_ok=True)
        copy_log(path, copy / path.name, piece.keeps, folder.resolve())
        said = _wandb_sync(copy)
        sent = synced_marker(copy / path.name).exists()
    if not sent:
        return SyncResult("", _reason(said))
    mark_synced(path, json.dumps({_LAST: piece.last}))
    url = _URL.search(said)
    return SyncResult(url[1] if url else "", None)


def _wandb_sync(folder: Path) -> str:
    """Run `wandb sync` on a start's directory; return what it said. Its exit code is always 0."""
    environment = {**os.environ, **_ENVIRONMENT}
    environment.pop("WANDB_MODE", None)
    environment.pop("WANDB_SILENT", None)
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return f"wandb sync took more than {TIMEOUT_S:g} s"
    return done.stdout


def _reason(said: str) -> str:
    lines = [line.removeprefix("wandb: ").strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"(?i)error|fail|not auth|took more", line)]
    return (telling or lines or ["wandb sync said nothing"])[-1]
