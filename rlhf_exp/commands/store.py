"""`rlhf-exp store ls|show|rm|gc`: artifacts of an output folder, their disk space and deletion.

Functions that return rows are for programs, those that return tables for people.
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

USAGE_HEADER = (
    "name",
    "runs",
    "total",
    "of its own",
    "shared",
    "unfinished",
    "logs",
    "W&B, of these",
)
TABLE_WIDTH = 120
MAX_FILES_SHOWN = 20
RESUME_FOLDERS = ("checkpoints/", "best/", "kept/")
"""Folders of an artifact from which a longer run can continue."""


def listing(outputs: Path) -> str:
    """Return the tables of all artifacts and unfinished stages, and of each name's disk space."""
    folder = OutputFolder(outputs)
    text = artifact_table(list_artifacts(folder.store, users(folder.records)))
    rows = [_usage_row(usage) for usage in sizes(folder.store, folder.records)]
    if rows:
        text += "\n" + table(USAGE_HEADER, rows, title="Disk space by name of the runs")
    return text


def _usage_row(usage: DiskUsage) -> tuple[str, ...]:
    numbers = (usage.total, usage.own, usage.shared, usage.unfinished, usage.logs, usage.tracked)
    return (usage.name, str(usage.points), *map(human_size, numbers))


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
        objective: the value that a sweep optimises, if the stage has one.
        path: its folder.
        note: the runs it belongs to, the process that works on it, or what is wrong.
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
    """Return a row for each artifact, each unfinished or running stage, and each damaged folder.

    Args:
        store: The store.
        users: The names of the runs that use an artifact, by key; None leaves them out.
    """
    rows = []
    for artifact in store.all():
        with suppress(FileNotFoundError):  # deleted meanwhile
            rows.append(
                _artifact_row(artifact, None if users is None else users.get(artifact.key, ()))
            )
    done = {(row.stage, row.key) for row in rows}
    holder_of = {(artifact.stage, artifact.key): artifact for artifact in holders(store.root)}
    for folder in sorted((store.root / ".staging").glob("*/")):
        stage, _, key = folder.name.partition("-")
        if (stage, key) in done:
            continue
        holder = holder_of.get((stage, key))
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


def _artifact_row(artifact: Artifact, users: Sequence[str] | None) -> ArtifactRow:
    note = "" if users is None else f"of {', '.join(users)}" if users else "no run refers to it"
    resume_bytes = sum(
        file.size
        for name, file in artifact.manifest.files.items()
        if name.startswith(RESUME_FOLDERS)
    )
    if resume_bytes:
        note += f"{'; ' if note else ''}{human_size(resume_bytes)} to go on from"
    created = datetime.fromisoformat(artifact.manifest.created)
    return ArtifactRow(
        stage=artifact.stage,
        key=artifact.key,
        state="done",
        bytes=artifact.size,
        age_s=(datetime.now(UTC) - created).total_seconds(),
        used_s=time.time() - (artifact.path / MANIFEST).stat().st_mtime,
        objective=artifact.manifest.objective,
        path=artifact.path,
        note=note,
    )


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
    return _render_table(f"{len(rows)} entries, {total}", header, lines, width, right=(3, 4, 5, 6))


def show(artifact: Artifact, width: int = TABLE_WIDTH) -> str:
    """Return an artifact's manifest as tables, with the largest files only."""
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
    parts = [_render_table(f"{artifact.stage}/{artifact.key}", ("", ""), facts, width)]
    metrics = dict(manifest.metrics)
    if manifest.objective is not None:
        metrics["objective"] = manifest.objective
    if metrics:
        numbers = [(name, f"{value:.6g}") for name, value in sorted(metrics.items())]
        parts.append(_render_table("metrics", ("metric", "value"), numbers, width, right=(1,)))
    files = sorted(manifest.files.items(), key=lambda item: -item[1].size)
    lines = [
        (name, human_size(file.size), file.sha256[:16]) for name, file in files[:MAX_FILES_SHOWN]
    ]
    if len(files) > MAX_FILES_SHOWN:
        lines.append((f"... and {len(files) - MAX_FILES_SHOWN} smaller ones", "", ""))
    parts.append(_render_table("files", ("file", "size", "sha256"), lines, width, right=(1,)))
    parts.append(f"config: {artifact.path / MANIFEST}\n")
    return "\n".join(parts)


def remove(store: Store, prefixes: Iterable[str], dry_run: bool) -> str:
    """Delete the artifacts with these key prefixes; return the table of them.

    Raises:
        UserError: a prefix fits no artifact or several, or one is in use. Nothing is deleted then.
    """
    artifacts = {artifact.key: artifact for artifact in map(store.get, prefixes)}
    for artifact in artifacts.values():
        store.remove(artifact, dry_run=True)
    warnings = [
        f"made from {artifact.stage}/{artifact.key} and kept: {child.stage}/{child.key}\n"
        for artifact in artifacts.values()
        for child in store.children(artifact.key)
        if child.key not in artifacts
    ]
    removals = [store.remove(artifact, dry_run) for artifact in artifacts.values()]
    return removal_table(removals, dry_run) + "".join(warnings)


def collect_garbage(
    outputs: Path,
    dry_run: bool,
    older_than: str | None = None,
    sweep: str | None = None,
    keep: str | None = None,
) -> str:
    """Delete what no run refers to; return the table of what was, or would be, deleted.

    Args:
        outputs: The output folder.
        dry_run: Whether to delete nothing.
        older_than: Time since the last use, such as `7d`, below which nothing is deleted; one hour
            by default.
        sweep: A name whose runs may lose their results, by `keep`.
        keep: The runs of `sweep` that keep their results: `best:3` or `last:5`.

    Raises:
        UserError: An argument is invalid, or one of `sweep` and `keep` is missing.
    """
    if (sweep is None) != (keep is None):
        raise UserError("store gc: --sweep NAME and --keep best:N go together; give both or none")
    folder = OutputFolder(outputs)
    rule = None if sweep is None or keep is None else RetentionRule.parse(sweep, keep)
    grace = GRACE_S if older_than is None else seconds_of(older_than)
    used_keys = kept_keys(folder.records, rule) | queued_keys(outputs, folder.records)
    removals = folder.store.gc(used_keys, dry_run, grace_s=grace)
    text = removal_table(removals, dry_run)
    removed_paths = {removal.path for removal in removals}
    kept_for_now = [
        removal
        for removal in folder.store.gc(used_keys, True, grace_s=0)
        if removal.path not in removed_paths
    ]
    if kept_for_now and grace > 0:
        size = human_size(sum(removal.bytes for removal in kept_for_now))
        text += (
            f"kept for now: {len(kept_for_now)} more, {size}, used in the last {human_age(grace)}; "
            "--older-than 0 takes them too, if nothing runs now\n"
        )
    return text


def queued_keys(outputs: Path, records: Records) -> set[str]:
    """Return the keys that queued jobs need or make; before they start, no record has them."""
    keys: set[str] = set()
    for name in submitted_names(outputs):
        ended = {record.key for record in records.sweep(name) if record.status in ENDED}
        jobs = [
            job
            for submission, job in latest_jobs(outputs, name)
            if job.id not in submission.cancelled
        ]
        waiting = [job for job in jobs if not job.shared and job.key not in ended]
        if waiting:
            keys |= {job.key for job in jobs if job.shared or job in waiting}
    return keys


def removal_table(removals: Sequence[Removal], dry_run: bool, width: int = TABLE_WIDTH) -> str:
    """Return the table of what was deleted, or (`dry_run`) would be."""
    if not removals:
        return "nothing to delete\n"
    total = human_size(sum(removal.bytes for removal in removals))
    verb = "would be deleted" if dry_run else "deleted"
    lines = [(str(removal.path), human_size(removal.bytes), removal.reason) for removal in removals]
    header = ("folder", "size", "why")
    return _render_table(f"{len(removals)} {verb}, {total}", header, lines, width, right=(1,))


def human_age(seconds: float) -> str:
    """Return a duration as text: `12 s`, `5 min`, `3.2 h`, `4.0 days`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"


def _render_table(
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

    rich_table = Table(title=Text(title), title_justify="left", box=SIMPLE, show_header=any(header))
    for number, name in enumerate(header):
        rich_table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for line in lines:
        # As Text, because a name with square brackets is not markup.
        rich_table.add_row(*(Text(cell) for cell in line))
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, highlight=False).print(rich_table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
