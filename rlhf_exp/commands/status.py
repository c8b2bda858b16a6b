"""`rlhf-exp status`: the runs below an output folder, or the points of one, with their jobs."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.commands.text import table
from rlhf_exp.search.journal import exists
from rlhf_exp.slurm.overview import View, job_views
from rlhf_exp.slurm.submission import submitted_names
from rlhf_exp.store.records import RunRecord, Status
from rlhf_exp.store.sizes import sizes
from rlhf_exp.study.setup import study_folder
from rlhf_exp.study.table import study_text

HEADER = ("name", "state", "stage", "key", "objective", "command line or error")
Row = tuple[str, ...]


def status(outputs: Path, run: str | None) -> str:
    """Return the runs as a table: name, state, stage, key, objective, command line or error.

    Args:
        outputs: The output folder.
        run: A run or multirun; None: all.
    """
    records, names = Outputs(outputs).records, submitted_names(outputs)
    if run is not None and exists(study_folder(outputs, run)):
        return study_text(outputs, run)
    if run is None:
        found = records.all()
    elif run in names:
        found, names = records.sweep(run), [run]
    else:
        found, names = records.resolve_all(run, Outputs(outputs).store), []
    views = {(name, view.job.key): view for name in names for view in job_views(outputs, name)}
    rows = [_row(record, views.pop((record.name, record.key), None)) for record in found]
    rows += [_job_row(name, view) for (name, _), view in views.items()]
    if not rows:
        return "no runs yet\n"
    logs = [f"{row[3]}: {row[-1]}\n" for row in rows if row[-1]]
    shown = table(HEADER, [row[:-1] for row in rows])
    if run is not None:
        store, every = Outputs(outputs).store, Outputs(outputs).records
        for usage in sizes(store, every, sorted({row[0] for row in rows} & set(every.names()))):
            shown += f"\nDisk space of {usage.name}: {usage}\n"
    return shown + ("\nLogs of what failed:\n" + "".join(logs) if logs else "")


def _row(record: RunRecord, view: View | None) -> Row:
    """Return a run's row; its last value is the log, if it failed and has one."""
    state, note = str(record.status), _last_line(record.error)
    if record.abandoned:
        state, note = str(Status.interrupted), "its process was killed; the same command goes on"
    if view is not None and record.status is not Status.done:
        # A job that was killed could not say so in its record.
        state, note = str(view.progress), view.note or note
    log = record.log if view is None else str(view.log)
    return (
        record.name,
        state,
        record.stage,
        record.key,
        "" if record.objective is None else f"{record.objective:.4g}",
        note or " ".join(record.overrides),
        log or "" if state == Status.failed else "",
    )


def _job_row(name: str, view: View) -> Row:
    """Return the row of a job without a record: it has not started, or makes what runs share."""
    job, what = view.job, view.note or " ".join(view.job.overrides)
    if job.shared:
        what = f"shared by the points{f': {view.note}' if view.note else ''}"
    log = str(view.log) if view.progress == "failed" else ""
    return (name, str(view.progress), job.stage, job.key, "", what, log)


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""
