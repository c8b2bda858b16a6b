"""`rlhf-exp sync` sends to W&B what was recorded offline; `fetch` downloads from the hub and pins.

Both are for a machine with a network that sees the same files as one without, such as a login node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.commands.runs import OutputFolder, composed_points, table
from rlhf_exp.errors import UserError
from rlhf_exp.http_client import HttpClient, Service
from rlhf_exp.pipeline import hub
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.pipeline.precision import with_precision
from rlhf_exp.redaction import without_secrets
from rlhf_exp.report.run.page import report_path
from rlhf_exp.safe_text import clipped, visible
from rlhf_exp.store.lease import holders
from rlhf_exp.tracking.wandb_sync import (
    RunStart,
    attach_report,
    last_step_sent,
    send,
    starts_of,
    unsent,
)

HEADER = ("stage", "key", "run", "starts", "state", "where")
FAILED = "failed"
CONNECT_TIMEOUT_S = 10.0


def sync(outputs: Path, run: str, dry_run: bool, tell: Callable[[str], None]) -> tuple[str, int]:
    """Send all unsent records of a run, or of each point of a multirun.

    Args:
        outputs: The output folder.
        run: A run or multirun.
        dry_run: Whether only to say what would be sent.
        tell: Prints progress.

    Returns:
        A table of all runs, and the number of runs that could not be sent.

    Raises:
        UserError: W&B cannot be reached.
    """
    tracked_runs = list(_tracked_runs(OutputFolder(outputs), run))
    if not tracked_runs:
        return f"{run}: nothing was recorded for W&B (tracking=disabled, or no stage ran)\n", 0
    to_send = [
        tracked for tracked in tracked_runs if not tracked.running and unsent(tracked.starts)
    ]
    if to_send and not dry_run:
        _check_server()
    rows = []
    for tracked in tracked_runs:
        if tracked in to_send and not dry_run:
            tell(f"{tracked.stage} {tracked.key}: sending run {tracked.run_id}")
        state, where = _send(tracked, outputs, dry_run)
        rows.append(
            (tracked.stage, tracked.key, tracked.run_id, str(len(tracked.starts)), state, where)
        )
    return table(HEADER, rows), sum(row[4] == FAILED for row in rows)


@dataclass(frozen=True)
class TrackedRun:
    """The W&B run of one stage, and its files.

    Attributes:
        stage: The stage.
        key: Its key.
        folder: Its folder, in the store or in staging.
        starts: The records of each start of the stage; empty if unreadable.
        running: Whether a process works in the folder.
        damage: The reason why the records are unreadable, or "".
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


def _tracked_runs(outputs: OutputFolder, run: str) -> Iterator[TrackedRun]:
    """Yield every W&B run of the stages of `run`, once, parents first."""
    in_progress = {(holder.stage, holder.key) for holder in holders(outputs.store.root)}
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
                running = folder == unfinished and (stage, key) in in_progress
                try:
                    starts = starts_of(folder)
                except UserError as error:
                    yield TrackedRun(stage, key, folder, [], running, str(error))
                    continue
                if starts:
                    yield TrackedRun(stage, key, folder, starts, running)


def _send(tracked: TrackedRun, outputs: Path, dry_run: bool) -> tuple[str, str]:
    """Send a run; return its state, and its URL or what went wrong."""
    if tracked.running:
        return "running", "send it when it has ended"
    if tracked.damage:
        return FAILED, tracked.damage
    pieces = unsent(tracked.starts)
    if not pieces:
        return "sent before", ""
    if dry_run:
        count = sum(len(piece.steps) for piece in pieces)
        return "would send", f"{count} rows of {len(pieces)} starts"
    return _send_pieces(tracked, outputs)


def _send_pieces(tracked: TrackedRun, outputs: Path) -> tuple[str, str]:
    url = ""
    try:
        last_step = last_step_sent(tracked.starts)
    except Exception as error:  # of `requests`, and several families of W&B's own
        text = without_secrets(f"{type(error).__name__}: {error}")
        said = visible(clipped(" ".join(text.split()), 300))
        return FAILED, f"W&B does not say what it has of the run: {said}"
    for piece in unsent(tracked.starts, last_step):
        try:
            result = send(piece, tracked.folder)
        except (OSError, UserError) as error:
            return FAILED, f"{piece.start.path}: {error}"
        if result.error is not None:  # W&B would put later starts in the place of these rows
            return FAILED, result.error
        url = result.url or url
    report = report_path(outputs, tracked.stage, tracked.key)
    reason = attach_report(tracked.folder, report) if report.is_file() else None
    return "sent", url if reason is None else f"{url} without its report ({clipped(reason, 200)})"


def _check_server() -> None:
    from rlhf_exp.tracking.wandb_tracker import wandb

    url = str(wandb.setup().settings.base_url)

    def unreachable(reason: str) -> UserError:
        return UserError(
            f"W&B cannot be reached at {url} ({reason}). Run this where there is a network, such "
            "as a login node that sees the same files; WANDB_BASE_URL names another server"
        )

    client = HttpClient(Service(url, timeout_s=CONNECT_TIMEOUT_S), unreachable)
    try:
        client.check_reachable("", admits=False)
    finally:
        client.close()


def fetch(
    overrides: Sequence[str], config_dir: Path | None, update: bool, tell: Callable[[str], None]
) -> None:
    """Fetch and pin the models and data of a run, or of each point of a multirun.

    Args:
        overrides: As on `launch.py`'s command line.
        config_dir: A further config folder.
        update: Whether to forget earlier pins and take the newest revisions.
        tell: Prints each download.

    Raises:
        UserError: Something cannot be fetched, or the command line is wrong.
    """
    output_dirs: dict[hub.Need, Path] = {}
    for config in composed_points(overrides, config_dir):
        output_dirs |= dict.fromkeys(
            hub.needs(config, plan(with_precision(config)[0])), Path(config.output_dir)
        )
    for need, output_dir in output_dirs.items():
        pin = hub.fetch(output_dir, need, update)
        tell(f"{need}: revision {pin.commit}, {len(pin.files)} files")
    if not output_dirs:
        tell("nothing of this run comes from the hub")
