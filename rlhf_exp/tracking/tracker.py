"""Where a stage reports to: the `Tracker` protocol, and the one that writes to W&B and locally.

The step axis is `global_step` everywhere. Only the process of rank 0 opens a tracker; the others
use `NullTracker`.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_exp.tracking.local import MetricsLog

Mode = Literal["offline", "online", "disabled"]
_ID_FILE = "run_id"
_ID_CHARACTERS = string.ascii_lowercase + string.digits


class Tracker(Protocol):
    """What a stage may say about its run.

    Attributes:
        run_id: The run's id, the same after a resume (and at W&B).
    """

    run_id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars at global step `step`. May be called several times for one step.

        Log a step before its checkpoint is written: a resume keeps the rows up to and including
        the checkpoint's step.
        """

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Record a table; cells are text, numbers, booleans or None."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the run's results: numbers or text, not a curve."""

    def mark_preempting(self) -> None:
        """Say that the run is being stopped and will be started again."""

    def finish(self, exit_code: int = 0) -> None:
        """Write everything out and close; further calls of it do nothing."""


class NullTracker:
    """The tracker of a process that has nothing to report."""

    run_id = ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def mark_preempting(self) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


class Several:
    """The tracker that reports to each of `trackers`, in order."""

    def __init__(self, *trackers: Tracker) -> None:
        self.run_id = trackers[0].run_id
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log(metrics, step)

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

    def mark_preempting(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.finish(exit_code)


def open_tracker(
    mode: Mode,
    folder: Path,
    *,
    run_id: str | None = None,
    project: str = "rlhf_exp",
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> Tracker:
    """Open the tracker of one stage execution.

    Args:
        mode: W&B `offline` (files in `folder/wandb`), `online`, or `disabled` (the local record
            only; wandb is not imported).
        folder: The run's folder; the local record and all W&B files go there.
        run_id: The id to continue. None takes the one that an earlier start left in `folder`, or
            makes a new one.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group: the sweep.
        job_type: W&B job type: the stage.
        name: W&B display name.
        tags: W&B tags.
        config: The resolved config, nested.
        resume_step: The global step being resumed from: the local record forgets later rows. None
            starts the record afresh.

    Raises:
        UserError: W&B cannot be reached or knows no key (`online` only).
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_id = _settle_run_id(folder / _ID_FILE, run_id)
    local = MetricsLog(folder, run_id=run_id, resume_step=resume_step)
    if mode == "disabled":
        return local
    from rlhf_exp.tracking.wandb_tracker import WandbTracker  # a second of import: only when used

    remote = WandbTracker(
        mode,
        folder,
        run_id=run_id,
        project=project,
        entity=entity,
        group=group,
        job_type=job_type,
        name=name,
        tags=tags,
        config=config or {},
    )
    return Several(local, remote)


def _settle_run_id(path: Path, run_id: str | None) -> str:
    """Decide on the run's id and leave it in the folder, where the next start finds it.

    A checkpoint holds the id too, but a run killed before its first checkpoint is the same run.
    """
    if run_id is None and path.exists():
        run_id = path.read_text().strip()
    run_id = run_id or "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))
    path.write_text(run_id + "\n")
    return run_id
