"""Starting a W&B run, offline if the server is away.

Measured with wandb 0.31, and the reason for what looks odd here:
- The transaction log is flushed every 15 s by default, so that a kill in the first seconds leaves
  nothing, not even the config. Every second costs nothing noticeable.
- Even offline, wandb sends telemetry over the network unless error reporting is off.
- The directory of a start is named by the second: another start within it would write over it.
- Without a server, `wandb.init` waits for 90 s by default and then fails.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
import wandb

from rlhf_exp.errors import UserError

log = logging.getLogger(__name__)

FLUSH_S = 1.0
START_S = 15.0  # then the run is recorded offline: a server that is away must not hold up training
FINISH_S = 60.0  # a lost server must not hold a finished job; what is unsent can be synced later


def start_run(
    mode: Literal["offline", "online"],
    folder: Path,
    run_id: str,
    *,
    config: Mapping[str, Any],
    **named: Any,  # noqa: ANN401 - what `wandb.init` takes
) -> tuple[wandb.Run, bool]:
    """Start or continue a W&B run; return it and whether it is online.

    Args:
        mode: "online" or "offline". A server that does not answer makes it offline.
        folder: The run's folder; the start makes a directory in `folder/wandb`.
        run_id: The id to create or continue.
        config: The resolved config, nested; enums are recorded by name, paths as text.
        named: Project, group and the like.

    Raises:
        UserError: W&B refused: no key.
    """
    given = dict(
        named,
        dir=folder,
        id=run_id,
        resume="allow",
        reinit="create_new",  # a run that someone else left open is not ours to continue
        config=json.loads(json.dumps(dict(config), default=_plain)),
    )
    _await_free_directory(folder / "wandb", run_id)
    try:
        return wandb.init(mode=mode, settings=_settings(mode), **given), mode == "online"
    except wandb.errors.CommError as error:
        log.warning(
            "tracking=online: W&B could not be reached, so this is recorded offline; "
            "`rlhf-exp sync` sends it later. (%s)",
            str(error).splitlines()[0],
        )
        wandb.teardown()  # else the id is in use, by the attempt
        return wandb.init(mode="offline", settings=_settings("offline"), **given), False
    except wandb.Error as error:
        raise UserError(
            f"tracking=online: W&B did not accept the run: {error} "
            "Log in with `wandb login` (or set WANDB_API_KEY) and check the connection, or "
            "record locally with tracking=offline and send it later."
        ) from error


def _await_free_directory(parent: Path, run_id: str) -> None:
    while any(parent.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


def _plain(value: object) -> str:
    """What JSON does not know, as text."""
    return value.name if isinstance(value, Enum) else str(value)


def _settings(mode: Literal["offline", "online"]) -> wandb.Settings:
    return wandb.Settings(
        x_transaction_log_flush_interval=FLUSH_S,
        init_timeout=START_S,
        finish_timeout=FINISH_S,
        finish_timeout_raises=True,
        console="off",  # a progress bar's redraws would fill the log
        silent=mode == "offline",
        quiet=True,
        symlink=False,  # the folder is moved when it is published, and links would break
    )
