"""`rlhf-exp store ls` and `gc`: what the runs of an output folder take on disk, and what may go.

What `rlhf-exp store ls|show|rm|gc` print: rows for programs, tables for people.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.errors import UserError
from rlhf_exp.launchers.slurm.submissions import latest_jobs, submitted_names
from rlhf_exp.store.artifact import MANIFEST, Artifact
from rlhf_exp.store.atomic_files import human_size, last_change, tree_size
from rlhf_exp.store.disk_usage import (
    ENDED,
    DiskUsage,
    RetentionRule,
    kept_keys,
    seconds_of,
    sizes,
    users,
)
from rlhf_exp.store.gc import GRACE_S, Removal
from rlhf_exp.store.lease import holders
from rlhf_exp.store.run_records import Records
from rlhf_exp.store.store import Store

HEADER = ("name", "runs", "total", "of its own", "shared", "unfinished", "logs", "W&B, of these")


def listing(outputs: Path) -> str:
    """Return the table of all results and unfinished work, and that of each name's disk space."""
    found = OutputFolder(outputs)
    shown = artifact_table(list_artifacts(found.store, users(found.records)))
    rows = [_row(one) for one in sizes(found.store, found.records)]
    if rows:
        shown += "\n" + table(HEADER, rows, title="Disk space by name of the runs")
    return shown


def collect_garbage(
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
    found = OutputFolder(outputs)
    rule = None if sweep is None or keep is None else RetentionRule.parse(sweep, keep)
    grace = GRACE_S if older_than is None else seconds_of(older_than)
    kept = kept_keys(found.records, rule) | queued_keys(outputs, found.records)
    removals = found.store.gc(kept, dry_run, grace_s=grace)
    shown = removal_table(removals, dry_run)
    gone = {one.path for one in removals}
    later = [one for one in found.store.gc(kept, True, grace_s=0) if one.path not in gone]
    if later and grace > 0:
        size = human_size(sum(one.bytes for one in later))
        shown += (
            f"kept for now: {len(later)} more, {size}, used in the last {human_age(grace)}; "
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


def _row(usage: DiskUsage) -> tuple[str, ...]:
    numbers = (usage.total, usage.own, usage.shared, usage.unfinished, usage.logs, usage.tracked)
    return (usage.name, str(usage.points), *map(human_size, numbers))


TABLE_WIDTH = 120
SHOWN_FILES = 20
STATE = ("checkpoints/", "best/", "kept/")
"""What a result holds so that a longer run can go on from it."""


@dataclass(frozen=True)
class ArtifactRow:
    """A line of `store ls`.

    Attributes:
        stage: the stage.
        key: its key.
        state: `done`, `unfinished`, `in progress` or `damaged`.
        bytes: size of its files.
        age_s: seconds since it was made, or last changed if it is not done.
        used_s: seconds since a run last used it; None if it is not done.
        objective: what a sweep optimises, if the stage has it.
        path: its folder.
        note: whose it is, who works on it, or what is wrong.
    """

    stage: str
    key: str
    state: str
    bytes: int
    age_s: float
    used_s: float | None
    objective: float | None
    path: Path
    note: str = ""


def list_artifacts(
    store: Store, users: Mapping[str, Sequence[str]] | None = None
) -> list[ArtifactRow]:
    """Return a row for each artifact, each unfinished or running work, and each damaged folder.

    Args:
        store: The store.
        users: The names of the runs that came to a key, by key; they become the artifacts' notes.
    """
    rows = []
    for one in store.all():
        with suppress(FileNotFoundError):  # deleted meanwhile
            rows.append(_artifact_row(one, None if users is None else users.get(one.key, ())))
    done = {(row.stage, row.key) for row in rows}
    working = {(one.stage, one.key): one for one in holders(store.root)}
    for folder in sorted((store.root / ".staging").glob("*/")):
        stage, _, key = folder.name.partition("-")
        if (stage, key) in done:
            continue
        holder = working.get((stage, key))
        rows.append(
            ArtifactRow(
                stage=stage,
                key=key,
                state="in progress" if holder else "unfinished",
                bytes=tree_size(folder),
                age_s=time.time() - last_change(folder),
                used_s=None,
                objective=None,
                path=folder,
                note=str(holder) if holder else "resumed by the same command",
            )
        )
    for folder in store.damaged():
        size, age = tree_size(folder), time.time() - last_change(folder)
        note = "no readable manifest; `rlhf-exp store gc` deletes it"
        rows.append(
            ArtifactRow(
                folder.parent.name, folder.name, "damaged", size, age, None, None, folder, note
            )
        )
    return rows


def artifact_table(rows: Sequence[ArtifactRow], width: int = TABLE_WIDTH) -> str:
    """Return the rows as a table with a total, `width` columns wide."""
    if not rows:
        return "the store is empty\n"
    lines = [
        (
            row.stage,
            row.key,
            row.state,
            human_size(row.bytes),
            human_age(row.age_s),
            "" if row.used_s is None else human_age(row.used_s),
            "" if row.objective is None else f"{row.objective:.4g}",
            row.note,
        )
        for row in rows
    ]
    total = human_size(sum(row.bytes for row in rows))
    header = ("stage", "key", "state", "size", "age", "last used", "objective", "")
    return _rendered(f"{len(rows)} entries, {total}", header, lines, width, right=(3, 4, 5, 6))


def show(artifact: Artifact, width: int = TABLE_WIDTH) -> str:
    """Return all that the manifest says, for people; long lists are cut and counted."""
    manifest = artifact.manifest
    git = manifest.git
    revision = f"{git.get('revision', 'none')}{' (with changes)' if git.get('dirty') else ''}"
    facts = [
        ("folder", str(artifact.path)),
        ("created", manifest.created),
        ("took", human_age(manifest.duration_s)),
        ("size", human_size(artifact.size)),
        ("processes", str(manifest.world_size)),
        ("git revision", revision),
        ("W&B run", manifest.wandb_run_id or "none"),
        ("made from", ", ".join(f"{role} {key}" for role, key in manifest.parents.items()) or "-"),
        ("versions", ", ".join(f"{name} {text}" for name, text in manifest.versions.items())),
        ("code", f"{len(manifest.code)} modules"),
    ]
    parts = [_rendered(f"{artifact.stage}/{artifact.key}", ("", ""), facts, width)]
    metrics = dict(manifest.metrics)
    if manifest.objective is not None:
        metrics["objective"] = manifest.objective
    if metrics:
        numbers = [(name, f"{value:.6g}") for name, value in sorted(metrics.items())]
        parts.append(_rendered("metrics", ("metric", "value"), numbers, width, right=(1,)))
    files = sorted(manifest.files.items(), key=lambda item: -item[1].size)
    lines = [(name, human_size(one.size), one.sha256[:16]) for name, one in files[:SHOWN_FILES]]
    if len(files) > SHOWN_FILES:
        lines.append((f"... and {len(files) - SHOWN_FILES} smaller ones", "", ""))
    parts.append(_rendered("files", ("file", "size", "sha256"), lines, width, right=(1,)))
    parts.append(f"config: {artifact.path / MANIFEST}\n")
    return "\n".join(parts)


def remove(store: Store, prefixes: Iterable[str], dry_run: bool) -> str:
    """Delete the artifacts with these key prefixes and say so.

    Raises:
        UserError: a prefix fits none or several, or one is in use; before anything is deleted.
    """
    wanted = {one.key: one for one in map(store.get, prefixes)}
    for one in wanted.values():
        store.remove(one, dry_run=True)
    warnings = [
        f"made from {one.stage}/{one.key} and kept: {child.stage}/{child.key}\n"
        for one in wanted.values()
        for child in store.children(one.key)
        if child.key not in wanted
    ]
    removals = [store.remove(one, dry_run) for one in wanted.values()]
    return removal_table(removals, dry_run) + "".join(warnings)


def removal_table(removals: Sequence[Removal], dry_run: bool, width: int = TABLE_WIDTH) -> str:
    """Return the table of what was deleted, or (`dry_run`) would be."""
    if not removals:
        return "nothing to delete\n"
    total = human_size(sum(one.bytes for one in removals))
    verb = "would be deleted" if dry_run else "deleted"
    lines = [(str(one.path), human_size(one.bytes), one.reason) for one in removals]
    header = ("folder", "size", "why")
    return _rendered(f"{len(removals)} {verb}, {total}", header, lines, width, right=(1,))


def human_age(seconds: float) -> str:
    """Return a span of time for people: `12 s`, `5 min`, `3.2 h`, `4.0 days`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"


def _artifact_row(one: Artifact, users: Sequence[str] | None) -> ArtifactRow:
    note = "" if users is None else f"of {', '.join(users)}" if users else "no run refers to it"
    state = sum(file.size for name, file in one.manifest.files.items() if name.startswith(STATE))
    if state:
        note += f"{'; ' if note else ''}{human_size(state)} to go on from"
    made = datetime.fromisoformat(one.manifest.created)
    return ArtifactRow(
        stage=one.stage,
        key=one.key,
        state="done",
        bytes=one.size,
        age_s=(datetime.now(UTC) - made).total_seconds(),
        used_s=time.time() - (one.path / MANIFEST).stat().st_mtime,
        objective=one.manifest.objective,
        path=one.path,
        note=note,
    )


def _rendered(
    title: str,
    header: Sequence[str],
    lines: Iterable[Sequence[str]],
    width: int,
    right: tuple[int, ...] = (),
) -> str:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title), title_justify="left", box=SIMPLE, show_header=any(header))
    for number, name in enumerate(header):
        drawn.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for line in lines:
        # As Text, because a name with square brackets is not markup.
        drawn.add_row(*(Text(cell) for cell in line))
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
