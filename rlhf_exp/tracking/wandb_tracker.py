"""The `Tracker` that writes a Weights & Biases run, online or as local files.

Measured with wandb 0.31, and the reason for what looks odd here:
- W&B drops or renumbers steps that go backwards, as they do after a resume. So `global_step` is a
  metric like any other, the axis of all others, and W&B's own step is left alone.
- `finish` returns before the file is complete (7 bytes were seen), and the folder is renamed soon
  after. So the exit record is awaited.
- With the server lost, `log` and `alert` go on; what needs an artifact (table, model) may raise.
- W&B's history is appended to and never corrected. So what a resume repeats is not sent twice, and
  what is known to have been lost is sent before it.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import md5
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_exp.errors import UserError
from rlhf_exp.tracking.local import STEP
from rlhf_exp.tracking.wandb_log import FINISH_S, is_complete, mark_synced, start_run, wandb

log = logging.getLogger(__name__)

WRITTEN_S = 10.0
BINS = 64
DIFF_FILE = "git-diff.patch"  # W&B's own, of the working directory, is called diff.patch


class WandbTracker:
    """One W&B run; its files go to `folder/wandb`, staged artifacts to `folder/wandb-data`.

    A resumed run has the same id. Every start makes a directory of its own; those written offline
    are joined by the id when they are sent (`wandb_sync.py`).

    Attributes:
        run_id: W&B's run id.
        url: Where the run is to be seen; None offline.

    Args:
        mode: "online" or "offline". A server that does not answer makes it offline.
        folder: The run's folder.
        run_id: The id to create or continue.
        project: W&B project.
        entity: W&B user or team.
        group: W&B group.
        job_type: W&B job type.
        name: W&B display name.
        tags: W&B tags.
        config: The resolved config, nested; enums are recorded by name, paths as text.
        diff: Text of the file `git-diff.patch`; empty: none.
        earlier: Rows of before the resume; online, the server is sent those that it lacks.

    Raises:
        UserError: W&B refused: no key.
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
        diff: str = "",
        earlier: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.run_id = run_id
        self._data_dir_before = os.environ.get("WANDB_DATA_DIR")
        self._finished = False
        self._postponed: list[Callable[[], object]] = []
        os.environ["WANDB_DATA_DIR"] = str(folder.resolve() / "wandb-data")
        try:
            self._run, self._online = start_run(
                mode,
                folder,
                run_id,
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                name=name,
                tags=list(tags),
                config=config,
            )
        except UserError:
            self._restore_environment()
            raise
        self.url = self._run.url if self._online else None  # asking offline prints a warning
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._sent = self._last_step_sent()
        if self._online:
            for row in earlier:
                self.log({key: row[key] for key in row if key != STEP}, int(row[STEP]))
        if diff:
            path = Path(self._run.dir) / DIFF_FILE
            path.write_text(diff, encoding="utf-8", errors="replace")
            self._run.save(str(path), base_path=self._run.dir, policy="now")

    def _last_step_sent(self) -> float:
        """The last step of a continued run that the server has."""
        if not (self._online and self._run.resumed):
            return -math.inf
        last = self._run.summary.get(STEP)
        return -math.inf if last is None else float(last)

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """See `Tracker`."""
        if step > self._sent:
            values = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}
            self._run.log({**values, STEP: step}, commit=not more)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """See `Tracker`. Values that are not finite are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if step > self._sent and finite.size:
            histogram = wandb.Histogram(np_histogram=np.histogram(finite, bins=BINS))
            self._run.log({name: histogram, STEP: step}, commit=False)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """See `Tracker`."""

        def made() -> wandb.Table:
            data = [list(row) for row in rows]
            return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)

        if step > self._sent:
            self._if_server(
                lambda: self._run.log({name: made()}, commit=False),
                # Its row is gone by then.
                later=lambda: self._run.summary.update({name: made()}),
            )

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._run.summary.update(dict(values))

    def alert(self, title: str, text: str, step: int) -> None:
        """See `Tracker`."""
        if step > self._sent:
            self._run.alert(title, f"Step {step}: {text}", "WARN")

    def model(self, name: str, made: Path, place: Path, facts: Mapping[str, Any]) -> None:
        """See `Tracker`. W&B wants to see a file before it believes that it exists."""

        def send() -> None:
            artifact = wandb.Artifact(name, "model", metadata=dict(facts))
            for entry in artifact.add_reference(made.resolve().as_uri(), checksum=False):
                entry.ref = f"{place.resolve().as_uri()}/{entry.path}"
                # What tells versions apart, as the place of a model trained again is the same.
                content = f"{entry.path} {facts.get('digest')}".encode()
                entry.digest = b64encode(md5(content, usedforsecurity=False).digest()).decode()
            self._run.log_artifact(artifact)

        self._if_server(send, later=send)

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        self._run.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`. Waits for the server at most `FINISH_S` seconds."""
        if self._finished:
            return
        self._finished = True
        start = Path(self._run.dir).parent
        written = start / f"run-{self.run_id}.wandb"
        try:
            for action in self._postponed:
                with suppress(wandb.Error):
                    action()
            self._finish_run(exit_code, written)
            _await_exit_record(written)
            # A link to a file in the user's cache, which later runs write to as well.
            (start / "logs" / "debug-core.log").unlink(missing_ok=True)
        finally:
            self._restore_environment()

    def _finish_run(self, exit_code: int, written: Path) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning("W&B took more than %g s: `rlhf-exp sync` sends the rest", FINISH_S)
            return
        if self._online:
            mark_synced(written)

    def _if_server(self, action: Callable[[], object], later: Callable[[], object]) -> None:
        """Do what may need the server; if it is lost, do `later` at the end."""
        try:
            action()
        except wandb.Error as error:
            log.warning("W&B: %s; trying again at the end of the run", error)
            self._postponed.append(later)

    def _restore_environment(self) -> None:
        if self._data_dir_before is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        else:
            os.environ["WANDB_DATA_DIR"] = self._data_dir_before


def _await_exit_record(path: Path) -> None:
    deadline = time.monotonic() + WRITTEN_S
    while not is_complete(path):
        if time.monotonic() > deadline:
            warnings.warn(f"{path}: W&B did not finish writing it", RuntimeWarning, stacklevel=3)
            return
        time.sleep(0.02)
