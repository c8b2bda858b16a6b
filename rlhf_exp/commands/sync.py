"""`rlhf-exp sync`: sends to W&B what was recorded offline.

`rlhf-exp fetch`: downloads what a run needs from the hub, on a machine that has a network.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.config.compose import compose
from rlhf_exp.config.overrides import override_problems, sweep_points, wrap_list_values
from rlhf_exp.config.problems import raise_problems
from rlhf_exp.config.schema_keys import CONF, read_groups
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline import hub
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.store.lease import holders
from rlhf_exp.tracking.wandb_sync import RunStart, last_step_sent, send, starts_of, unsent

HEADER = ("stage", "key", "run", "starts", "state", "where")
FAILED = "failed"
REACH_S = 10.0


@dataclass(frozen=True)
class TrackedRun:
    """The W&B run of one stage's execution, and where its files are.

    Attributes:
        stage: The stage.
        key: Its key.
        folder: Its folder, in the store or in staging.
        starts: What was recorded; nothing if that cannot be read.
        running: Whether a process is at work in the folder.
        damage: Why it cannot be read, or "".
    """

    stage: str
    key: str
    folder: Path
    starts: list[RunStart]
    running: bool
    damage: str = ""

    @property
    def run_id(self) -> str:
        """W&B's id of the run."""
        return self.starts[0].run_id if self.starts else ""


def sync(outputs: Path, run: str, dry_run: bool, tell: Callable[[str], None]) -> tuple[str, int]:
    """Send all that has not been sent of a run, or of each point of a multirun.

    Args:
        outputs: The output folder.
        run: A run or multirun.
        dry_run: Whether only to say what would be sent.
        tell: Says what is under way.

    Returns:
        A table of all runs, and how many could not be sent.

    Raises:
        UserError: W&B cannot be reached.
    """
    found = list(_tracked(OutputFolder(outputs), run))
    if not found:
        return f"{run}: nothing was recorded for W&B (tracking=disabled, or no stage ran)\n", 0
    work = [one for one in found if not one.running and unsent(one.starts)]
    if work and not dry_run:
        _check_server()
    rows = []
    for one in found:
        if one in work and not dry_run:
            tell(f"{one.stage} {one.key}: sending run {one.run_id}")
        state, where = _sent(one, dry_run)
        rows.append((one.stage, one.key, one.run_id, str(len(one.starts)), state, where))
    return table(HEADER, rows), sum(row[4] == FAILED for row in rows)


def _tracked(outputs: OutputFolder, run: str) -> Iterator[TrackedRun]:
    """Yield every W&B run that the points of `run` have made or use, once, parents first."""
    held = {(one.stage, one.key) for one in holders(outputs.store.root)}
    seen = set()
    for record in outputs.records.resolve_all(run, outputs.store):
        for stage, key in record.keys.items():
            if (stage, key) in seen:
                continue
            seen.add((stage, key))
            artifact = outputs.store.lookup(stage, key)
            unfinished = outputs.store.unfinished(stage, key)
            folders = (None if artifact is None else artifact.path, unfinished)
            for folder in filter(None, folders):
                running = folder == unfinished and (stage, key) in held
                try:
                    starts = starts_of(folder)
                except UserError as error:
                    yield TrackedRun(stage, key, folder, [], running, str(error))
                    continue
                if starts:
                    yield TrackedRun(stage, key, folder, starts, running)


def _sent(one: TrackedRun, dry_run: bool) -> tuple[str, str]:
    """Send a run; return its state and where it is to be seen, or what went wrong."""
    if one.running:
        return "running", "send it when it has ended"
    if one.damage:
        return FAILED, one.damage
    pieces = unsent(one.starts)
    if not pieces:
        return "sent before", ""
    if dry_run:
        count = sum(len(piece.steps) for piece in pieces)
        return "would send", f"{count} rows of {len(pieces)} starts"
    return _send_all(one)


def _send_all(one: TrackedRun) -> tuple[str, str]:
    from rlhf_exp.tracking.wandb_tracker import wandb

    where = ""
    try:
        after = last_step_sent(one.starts)
    except wandb.Error as error:
        return FAILED, f"W&B does not say what it has of the run: {error}"
    for piece in unsent(one.starts, after):
        result = send(piece, one.folder)
        if result.error is not None:  # later starts would take the place of this one's rows
            return FAILED, result.error
        where = result.url or where
    return "sent", where


def _check_server() -> None:
    from rlhf_exp.tracking.wandb_tracker import wandb

    url = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(url, timeout=REACH_S).close()
    except urllib.error.HTTPError:  # it answers
        return
    except OSError as error:
        raise UserError(
            f"W&B cannot be reached at {url} ({error}). Run this where there is a network, such as "
            "a login node that sees the same files; WANDB_BASE_URL names another server"
        ) from error


def fetch(
    overrides: Sequence[str], folder: Path | None, update: bool, tell: Callable[[str], None]
) -> None:
    """Fetch and pin the models and data of a run, or of each point of a multirun.

    Args:
        overrides: As on `launch.py`'s command line.
        folder: A further config folder.
        update: Whether to forget earlier pins and take the newest revisions.
        tell: Says what was fetched.

    Raises:
        UserError: Something cannot be fetched, or the command line is wrong.
    """
    folders = [CONF, *([folder.expanduser().resolve()] if folder else [])]
    wanted = wrap_list_values(overrides)
    raise_problems(override_problems(wanted, read_groups(folders)))
    found: dict[hub.Need, Path] = {}
    for point in sweep_points(wanted):
        config = compose(point, folders).config
        found |= dict.fromkeys(hub.needs(config, plan(config)), Path(config.output_dir))
    for need, output_dir in found.items():
        pin = hub.fetch(output_dir, need, update)
        tell(f"{need}: revision {pin.commit}, {len(pin.files)} files")
    if not found:
        tell("nothing of this run comes from the hub")
