"""Creation of a stage's tracker: local record, TensorBoard if asked for, W&B, and alerts."""

from __future__ import annotations

import logging
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rlhf_exp.redaction import redacted
from rlhf_exp.store.atomic_files import write_text_atomic
from rlhf_exp.tracking.alerts import AlertMonitor, AlertRules
from rlhf_exp.tracking.local import MetricsLog, read_metrics
from rlhf_exp.tracking.tracker import CompositeTracker, Tracker

Mode = Literal["offline", "online", "disabled"]
_ID_FILE = "run_id"
log = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ID_CHARACTERS = string.ascii_lowercase + string.digits


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
    also: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    diff: str = "",
    alerts: AlertRules | None = None,
    resume_step: int | None = None,
) -> Tracker:
    """Open the tracker of one stage execution.

    Args:
        mode: W&B `offline` (files in `folder/wandb`), `online`, or `disabled` (the local record
            only; wandb is not imported).
        folder: The run's folder; the local record and all W&B files go there.
        run_id: Id of the run to continue. None: the id that an earlier start left in `folder`, or a
            new one.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group: the sweep.
        job_type: W&B job type: the stage.
        name: W&B display name.
        tags: W&B tags.
        also: Further trackers: `tensorboard`.
        config: The resolved config, nested.
        diff: Difference of the code from its git revision; saved as a file of the W&B run.
        alerts: Thresholds of alerts; None: no alerts.
        resume_step: The global step being resumed from: later rows of the local record are removed.
            None starts a new record.

    Raises:
        UserError: W&B has no API key (`online` only), or a tracker's package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_id = _resolve_run_id(folder / _ID_FILE, run_id)
    local = MetricsLog(folder, run_id=run_id, resume_step=resume_step)
    earlier = read_metrics(folder / "metrics.jsonl")
    monitor = AlertMonitor(alerts)
    for row in earlier:  # the rules compare with rows from before the resume
        monitor.check(row)
    trackers: list[Tracker] = [local]
    if "tensorboard" in also:
        from rlhf_exp.tracking.tensorboard_tracker import TensorBoardTracker

        shown = redacted(dict(config or {}))
        board = TensorBoardTracker(
            folder,
            run_id=run_id,
            stage=job_type,
            name=name or run_id,
            config=shown,
            resume_step=resume_step,
        )
        trackers.append(board)
    if mode == "disabled":
        return CompositeTracker(*trackers, alerts=monitor)
    from rlhf_exp.tracking.wandb_tracker import WandbTracker

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
        diff=diff,
        earlier=earlier,
    )
    return CompositeTracker(*trackers, remote, alerts=monitor)


def import_early(mode: Mode) -> None:
    """Import wandb for `open_tracker`, before torch is imported.

    Parts of wandb search all loaded modules for their own source (pydantic's
    `use_attribute_docstrings`), which takes a third of a second more after torch and transformers.
    """
    if mode != "disabled":
        # First: it sets an environment variable that wandb reads while it is imported.
        import_module("rlhf_exp.tracking.wandb_tracker")
        import_module("wandb.sdk.launch")  # `wandb.init` imports it


def _resolve_run_id(path: Path, run_id: str | None) -> str:
    """Return the run's id and write it into the folder for the next start.

    A checkpoint contains the id too, but a run killed before its first checkpoint is the same run.
    """
    if run_id is None and path.exists():
        noted = path.read_text(encoding="utf-8", errors="replace").strip()
        if _RUN_ID.fullmatch(noted):
            run_id = noted
        else:
            log.warning("%s is damaged: the run is tracked under a new id", path)
    run_id = run_id or "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))
    write_text_atomic(path, run_id + "\n")
    return run_id
