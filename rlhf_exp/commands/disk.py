"""`rlhf-exp store ls` and `gc`: what the runs of an output folder take on disk, and what may go."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.commands.text import table
from rlhf_exp.errors import UserError
from rlhf_exp.slurm.submission import latest_jobs, submitted_names
from rlhf_exp.store import views
from rlhf_exp.store.collect import GRACE_S
from rlhf_exp.store.files import human_size
from rlhf_exp.store.records import Records
from rlhf_exp.store.retention import ENDED, Rule, kept_keys, seconds_of
from rlhf_exp.store.sizes import Usage, sizes, users

HEADER = ("name", "runs", "total", "of its own", "shared", "unfinished", "logs", "W&B, of these")


def listing(outputs: Path) -> str:
    """Return the table of all results and unfinished work, and that of each name's disk space."""
    found = Outputs(outputs)
    shown = views.table(views.list_artifacts(found.store, users(found.records)))
    rows = [_row(one) for one in sizes(found.store, found.records)]
    if rows:
        shown += "\n" + table(HEADER, rows, title="Disk space by name of the runs")
    return shown


def collect(
    outputs: Path,
    dry_run: bool,
    older_than: str | None = None,
    sweep: str | None = None,
    keep: str | None = None,
) -> str:
    """Delete what no run refers to, and return the table of what went, or would go.

    Args:
        outputs: The output folder.
        dry_run: Only say it.
        older_than: What was used more lately stays: `7d`; an hour by default.
        sweep: A name whose runs are thinned out.
        keep: Which of its runs keep their results: `best:3` or `last:5`.

    Raises:
        UserError: An argument is not understood, or one of `sweep` and `keep` is missing.
    """
    if (sweep is None) != (keep is None):
        raise UserError("store gc: --sweep NAME and --keep best:N go together; give both or none")
    found = Outputs(outputs)
    rule = None if sweep is None or keep is None else Rule.parse(sweep, keep)
    grace = GRACE_S if older_than is None else seconds_of(older_than)
    kept = kept_keys(found.records, rule) | queued_keys(outputs, found.records)
    removals = found.store.gc(kept, dry_run, grace_s=grace)
    shown = views.removal_table(removals, dry_run)
    gone = {one.path for one in removals}
    later = [one for one in found.store.gc(kept, True, grace_s=0) if one.path not in gone]
    if later and grace > 0:
        size = human_size(sum(one.bytes for one in later))
        shown += (
            f"kept for now: {len(later)} more, {size}, used in the last {views.human_age(grace)}; "
            "--older-than 0 takes them too, if nothing runs now\n"
        )
    return shown


def queued_keys(outputs: Path, records: Records) -> set[str]:
    """Return the keys that jobs in a queue need or make; they have no record before they start."""
    kept: set[str] = set()
    for name in submitted_names(outputs):
        ended = {one.key for one in records.sweep(name) if one.status in ENDED}
        jobs = [job for made, job in latest_jobs(outputs, name) if job.id not in made.cancelled]
        waiting = [job for job in jobs if not job.shared and job.key not in ended]
        if waiting:
            kept |= {job.key for job in jobs if job.shared or job in waiting}
    return kept


def _row(usage: Usage) -> tuple[str, ...]:
    numbers = (usage.total, usage.own, usage.shared, usage.unfinished, usage.logs, usage.tracked)
    return (usage.name, str(usage.points), *map(human_size, numbers))
