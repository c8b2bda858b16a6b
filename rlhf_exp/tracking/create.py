"""Opens the tracker of a stage: the local record, W&B if asked for, and the alarms."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_exp.tracking.alerts import AlertMonitor, AlertRules
from rlhf_exp.tracking.local import MetricsLog, read_metrics
from rlhf_exp.tracking.tracker import CompositeTracker, Tracker

Mode = Literal["offline", "online", "disabled"]
_ID_FILE = "run_id"
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
        run_id: The id to continue. None takes the one that an earlier start left in `folder`, or
            makes a new one.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group: the sweep.
        job_type: W&B job type: the stage.
        name: W&B display name.
        tags: W&B tags.
        config: The resolved config, nested.
        diff: How the code differs from its git revision; a file of the W&B run.
        alerts: When to raise alarms; None: never.
        resume_step: The global step being resumed from: the local record forgets later rows. None
            starts the record afresh.

    Raises:
        UserError: W&B knows no key (`online` only).
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_id = _settle_run_id(folder / _ID_FILE, run_id)
    local = MetricsLog(folder, run_id=run_id, resume_step=resume_step)
    earlier = read_metrics(folder / "metrics.jsonl")
    alarms = AlertMonitor(alerts)
    for row in earlier:  # what has been seen before the resume
        alarms.see(row)
    if mode == "disabled":
        return CompositeTracker(local, alarms=alarms)
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
    return CompositeTracker(local, remote, alarms=alarms)


def get_ready(mode: Mode) -> None:
    """Import what `open_tracker` will need, before torch is imported.

    Parts of wandb look for their own source among all modules that are loaded (pydantic's
    `use_attribute_docstrings`), which takes a third of a second more after torch and transformers.
    """
    if mode != "disabled":
        from wandb.sdk import launch  # noqa: F401 - starting a run imports it

        from rlhf_exp.tracking import wandb_tracker  # noqa: F401


def _settle_run_id(path: Path, run_id: str | None) -> str:
    """Decide on the run's id and leave it in the folder, where the next start finds it.

    A checkpoint holds the id too, but a run killed before its first checkpoint is the same run.
    """
    if run_id is None and path.exists():
        run_id = path.read_text().strip()
    run_id = run_id or "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))
    path.write_text(run_id + "\n")
    return run_id
