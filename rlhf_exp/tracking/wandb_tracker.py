"""The `Tracker` that writes a Weights & Biases run, online or as local files.

Measured with wandb 0.31, and the reason for what looks odd here:
- The transaction log is flushed every 15 s by default, so that a kill in the first seconds leaves
  nothing, not even the config. Every second costs nothing noticeable.
- W&B drops or renumbers steps that go backwards, as they do after a resume. So `global_step` is a
  metric like any other, the axis of all others, and W&B's own step is left alone.
- Even offline, wandb sends telemetry over the network unless error reporting is off.
- `finish` returns before the file is complete (7 bytes were seen), and the folder is renamed soon
  after. So the exit record is awaited.
- The directory of a start is named by the second: another start within it would write over it.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
import wandb

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.local import STEP
from rlhf_exp.tracking.wandb_file import is_complete

FLUSH_S = 1.0
WRITTEN_S = 10.0
FINISH_S = 60.0  # a lost server must not hold a finished job; what is unsent can be synced later


class WandbTracker:
    """One W&B run; its files go to `folder/wandb`, staged artifacts to `folder/wandb-data`.

    A resumed run has the same id. Offline every start makes a directory of its own, which
    `wandb sync` joins by the id.

    Attributes:
        run_id: W&B's run id.
        url: Where the run is to be seen; None offline.

    Args:
        mode: "online" or "offline".
        folder: The run's folder.
        run_id: The id to create or continue.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group.
        job_type: W&B job type.
        name: W&B display name.
        tags: W&B tags.
        config: The resolved config, nested; enums are recorded by name, paths as text.

    Raises:
        UserError: W&B refused: no key, no server.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        folder: Path,
        *,
        run_id: str,
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str | None,
        name: str | None,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        self.run_id = run_id
        self._data_dir_before = os.environ.get("WANDB_DATA_DIR")
        self._finished = False
        os.environ["WANDB_DATA_DIR"] = str(folder.resolve() / "wandb-data")
        _await_free_directory(folder / "wandb", run_id)
        try:
            self._run = wandb.init(
                mode=mode,
                dir=folder,
                id=run_id,
                resume="allow",
                reinit="create_new",  # a run that someone else left open is not ours to continue
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                name=name,
                tags=list(tags),
                config=json.loads(json.dumps(dict(config), default=_plain)),
                settings=_settings(mode),
            )
        except wandb.Error as error:
            self._restore_environment()
            raise UserError(
                f"tracking=online: W&B did not accept the run: {error} "
                "Log in with `wandb login` (or set WANDB_API_KEY) and check the connection, or "
                "record locally with tracking=offline and send it later."
            ) from error
        self.url = self._run.url if mode == "online" else None  # asking offline prints a warning
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        values = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}
        self._run.log({**values, STEP: step})

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""
        data = [list(row) for row in rows]
        table = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
        self._run.log({name: table, STEP: step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._run.summary.update(dict(values))

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        self._run.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`. Waits for the server at most `FINISH_S` seconds."""
        if self._finished:
            return
        self._finished = True
        try:
            self._run.finish(exit_code=exit_code)
            start = Path(self._run.dir).parent
            _await_exit_record(start / f"run-{self.run_id}.wandb")
            # A link to a file in the user's cache, which later runs write to as well.
            (start / "logs" / "debug-core.log").unlink(missing_ok=True)
        finally:
            self._restore_environment()

    def _restore_environment(self) -> None:
        if self._data_dir_before is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        else:
            os.environ["WANDB_DATA_DIR"] = self._data_dir_before


def _await_free_directory(parent: Path, run_id: str) -> None:
    while any(parent.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


def _await_exit_record(path: Path) -> None:
    deadline = time.monotonic() + WRITTEN_S
    while not is_complete(path):
        if time.monotonic() > deadline:
            warnings.warn(f"{path}: W&B did not finish writing it", RuntimeWarning, stacklevel=3)
            return
        time.sleep(0.02)


def _plain(value: object) -> str:
    """What JSON does not know, as text."""
    return value.name if isinstance(value, Enum) else str(value)


def _settings(mode: Literal["offline", "online"]) -> wandb.Settings:
    return wandb.Settings(
        x_transaction_log_flush_interval=FLUSH_S,
        finish_timeout=FINISH_S,
        console="off",  # a progress bar's redraws would fill the log
        silent=mode == "offline",
        quiet=True,
        symlink=False,  # the folder is moved when it is published, and links would break
    )
