"""`rlhf-exp status`: the runs below an output folder, or the points of one, with their jobs.

`rlhf-exp compare A B`: how two runs, or two groups of runs, differ in config and results.

`rlhf-exp report`: the page of a run, of a sweep or of any set of runs, from the store.

`rlhf-exp figures`: the charts of a run as SVG files, for papers and documentation.

`rlhf-exp cancel`: ends the Slurm jobs of a name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.commands.runs import OutputFolder, table
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.preference import estimate_to_json
from rlhf_exp.launchers.optuna.table import study_text
from rlhf_exp.launchers.optuna.trial import study_folder
from rlhf_exp.launchers.slurm import monitor
from rlhf_exp.launchers.slurm.monitor import JobView, job_views
from rlhf_exp.launchers.slurm.submissions import submitted_names
from rlhf_exp.report.run.charts import write_sheets
from rlhf_exp.report.run.gather import gather
from rlhf_exp.report.run.page import build_report
from rlhf_exp.report.sweep.compare import ComparedSide, Comparison, MetricRow, compared
from rlhf_exp.report.sweep.data import FEWEST, SeedSummary, Sweep
from rlhf_exp.report.sweep.gather import gather_sweep
from rlhf_exp.report.sweep.page import build_sweep_report, to_csv, to_json
from rlhf_exp.search.study import study_exists
from rlhf_exp.store.disk_usage import sizes
from rlhf_exp.store.run_records import RunRecord, Status

HEADER = ("name", "state", "stage", "key", "objective", "command line or error")
Cells = tuple[str, ...]


def status(outputs: Path, run: str | None) -> str:
    """Return the runs as a table: name, state, stage, key, objective, command line or error.

    Args:
        outputs: The output folder.
        run: A run or multirun; None: all.
    """
    records, names = OutputFolder(outputs).records, submitted_names(outputs)
    if run is not None and study_exists(study_folder(outputs, run)):
        return study_text(outputs, run)
    if run is None:
        found = records.all()
    elif run in names:
        found, names = records.sweep(run), [run]
    else:
        found, names = records.resolve_all(run, OutputFolder(outputs).store), []
    views = {(name, view.job.key): view for name in names for view in job_views(outputs, name)}
    rows = [_row(record, views.pop((record.name, record.key), None)) for record in found]
    rows += [_job_row(name, view) for (name, _), view in views.items()]
    if not rows:
        return "no runs yet\n"
    logs = [f"{row[3]}: {row[-1]}\n" for row in rows if row[-1]]
    shown = table(HEADER, [row[:-1] for row in rows])
    if run is not None:
        store, every = OutputFolder(outputs).store, OutputFolder(outputs).records
        for usage in sizes(store, every, sorted({row[0] for row in rows} & set(every.names()))):
            shown += f"\nDisk space of {usage.name}: {usage}\n"
    return shown + ("\nLogs of what failed:\n" + "".join(logs) if logs else "")


def _row(record: RunRecord, view: JobView | None) -> Cells:
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


def _job_row(name: str, view: JobView) -> Cells:
    """Return the row of a job without a record: it has not started, or makes what runs share."""
    job, what = view.job, view.note or " ".join(view.job.overrides)
    if job.shared:
        what = f"shared by the points{f': {view.note}' if view.note else ''}"
    log = str(view.log) if view.progress == "failed" else ""
    return (name, str(view.progress), job.stage, job.key, "", what, log)


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


def compare(outputs: Path, first: str, second: str, form: str = "text") -> str:
    """Return the differences between two runs or groups of runs.

    Args:
        outputs: The output folder.
        first: A run, the name of several, or `NAME:KEY=VALUE,...`.
        second: The other.
        form: `text`, `json` or `csv`.
    """
    found = OutputFolder(outputs)
    comparison = compared(_side(found, first), _side(found, second))
    if form == "json":
        return json.dumps(_to_json(comparison), indent=1, allow_nan=False) + "\n"
    return _to_csv(comparison) if form == "csv" else _to_text(comparison)


def _side(found: OutputFolder, name: str) -> ComparedSide:
    """Return the results of the runs of a side; those that are not done are left out and counted.

    Raises:
        UserError: None of several is done, or the only one has no results.
    """
    records = found.select(name)
    if len(records) == 1:
        return ComparedSide(name, (found.artifacts_of(records[0], name),))
    done = [one for one in records if one.status is Status.done]
    if not done:
        raise UserError(f"{name}: none of its {len(records)} runs is done; see rlhf-exp status")
    runs = tuple(found.artifacts_of(one, f"{one.name}/{one.key}") for one in done)
    return ComparedSide(name, runs, unfinished=len(records) - len(done))


def _to_text(found: Comparison) -> str:
    names = (f"A: {found.a.name}", f"B: {found.b.name}")
    parts = ["".join(f"{note}\n" for note in found.notes)]
    if found.config:
        parts.append(table(("config", *names), found.config))
    else:
        parts.append("The configs are the same.\n")
    several = len(found.a.runs) > 1 or len(found.b.runs) > 1
    if found.metrics:
        ends = ("95 % interval over runs",) if several else ()
        rows = [_metric_row(row, several) for row in found.metrics]
        parts.append(table(("result", *names, "B - A", *ends), rows))
    if found.paired:
        title = f"B - A over the same {found.prompts} prompts"
        rows = [
            (label, f"{one.mean:+.4g}", f"{one.low:+.4g} to {one.high:+.4g}")
            for label, one in found.paired
        ]
        parts.append(table((title, "mean", "95 % interval"), rows))
    return "\n".join(part for part in parts if part)


def _metric_row(row: MetricRow, several: bool) -> tuple[str, ...]:
    cells = (row.name, _words(row.a), _words(row.b), f"{row.difference.mean:+.4g}")
    if not several:
        return cells
    low, high = row.difference.low, row.difference.high
    if row.shared:
        return (*cells, "the same results")
    known = math.isfinite(low) and math.isfinite(high)
    return (*cells, f"{low:+.4g} to {high:+.4g}" if known else f"needs {FEWEST} runs of each")


def _words(summary: SeedSummary) -> str:
    mean, values = summary.estimate.mean, summary.values
    if len(values) == 1:
        return f"{mean:.4g}"
    if summary.has_interval:
        low, high = summary.estimate.low, summary.estimate.high
        return f"{mean:.4g} [{low:.4g}, {high:.4g}] ({len(values)})"
    return f"{mean:.4g} ({', '.join(f'{value:.4g}' for value in values)})"


def _to_json(found: Comparison) -> dict[str, Any]:
    return {
        "a": {"name": found.a.name, "runs": found.a.keys, "unfinished": found.a.unfinished},
        "b": {"name": found.b.name, "runs": found.b.keys, "unfinished": found.b.unfinished},
        "notes": list(found.notes),
        "config": [{"key": key, "a": a, "b": b} for key, a, b in found.config],
        "metrics": [
            {
                "name": row.name,
                "a": row.a.to_json(),
                "b": row.b.to_json(),
                "difference": estimate_to_json(row.difference),
            }
            for row in found.metrics
        ],
        "prompts": {
            "count": found.prompts,
            "differences": {label: estimate_to_json(one) for label, one in found.paired},
        },
    }


def _to_csv(found: Comparison) -> str:
    """Return one line a difference: of the config, of metrics, of answers to the same prompts."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("kind", "name", "a", "b", "difference", "low", "high", "n_a", "n_b"))
    for key, a, b in found.config:
        writer.writerow(("config", key, a, b, "", "", "", "", ""))
    for row in found.metrics:
        numbers = (row.a.estimate.mean, row.b.estimate.mean, row.difference.mean)
        counts = (len(row.a.values), len(row.b.values))
        ends = map(_finite, (row.difference.low, row.difference.high))
        writer.writerow(("metric", row.name, *numbers, *ends, *counts))
    for label, one in found.paired:
        ends = map(_finite, (one.low, one.high))
        writer.writerow(("prompts", label, "", "", one.mean, *ends, found.prompts, found.prompts))
    return buffer.getvalue()


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else ""


# File names of pages stay below what file systems take.
_LONGEST = 80


def report(outputs: Path, runs: Sequence[str], form: str, kl_budget: float | None = None) -> str:
    """Write the page of some runs and return its path, or return them as JSON or CSV.

    Args:
        outputs: The output folder.
        runs: What the runs are called; one run has a page of its own kind, more share one.
        form: `page`, `json` or `csv`.
        kl_budget: Nats per answer: runs are judged by their highest validation reward within it.
    """
    found = OutputFolder(outputs)
    records = list({one.key: one for run in runs for one in found.select(run)}.values())
    if form == "page" and len(records) == 1:
        return f"{_write_one(found, records[0], runs[0])}\n"
    sweep = sweep_of(found, ", ".join(dict.fromkeys(runs)), records, kl_budget)
    if form == "json":
        return json.dumps(to_json(sweep), indent=1, allow_nan=False) + "\n"
    if form == "csv":
        return to_csv(sweep)
    path = outputs / "reports" / f"sweep-{_file_name(runs)}.html"
    return f"{build_sweep_report(sweep, path).resolve()}\n"


def sweep_of(
    found: OutputFolder, title: str, records: Sequence[RunRecord], kl_budget: float | None = None
) -> Sweep:
    """Return what is known of some runs, with the logs of their jobs."""
    files = {one.key: found.records.root / one.name / "logs" / f"{one.key}.log" for one in records}
    logs = {key: str(path) for key, path in files.items() if path.is_file()}
    for name in {one.name for one in records} & set(submitted_names(found.folder)):
        logs |= {view.job.key: str(view.log) for view in job_views(found.folder, name)}
    return gather_sweep(title, records, found.store, found.records, logs, kl_budget)


def _write_one(found: OutputFolder, record: RunRecord, run: str) -> Path:
    artifacts = found.artifacts_of(record, run)
    final = list(artifacts.values())[-1]
    path = found.folder / "reports" / f"{final.stage}-{final.key}.html"
    return build_report(gather(record.name, artifacts), path).resolve()


def _file_name(runs: Sequence[str]) -> str:
    """Return a file name for a set of runs: readable, and another for another set."""
    text = "+".join(runs)
    safe = re.sub(r"[^A-Za-z0-9_.+=-]", "_", text)
    if safe == text and len(text) <= _LONGEST:
        return text
    return f"{safe[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_figures(outputs: Path, run: str, folder: Path) -> list[Path]:
    """Write the charts of `run` into `folder`, one file a stage, and return their paths."""
    found = OutputFolder(outputs)
    data = gather(found.run(run).name, found.artifacts(run))
    return write_sheets(data.metrics, folder, data.calibration, data.kl_target)


def cancel(outputs: Path, name: str) -> str:
    """Cancel the jobs that were submitted under a name and have not ended; return what was done.

    Raises:
        UserError: Nothing has been submitted under that name, or Slurm refuses.
    """
    names = submitted_names(outputs)
    if name not in names:
        known = f"names with jobs: {', '.join(names)}" if names else "no jobs were submitted yet"
        raise UserError(f"cancel {name}: no Slurm jobs below {outputs}; {known}")
    ended = monitor.cancel_by_name(outputs, name)
    if not ended:
        return f"{name}: no job is in the queue\n"
    lines = [f"  {view.job.id}  {view.progress}  {view.job.stage} {view.job.key}" for view in ended]
    more = "What they have done is kept: the same command of launch.py goes on.\n"
    return "\n".join([f"{name}: cancelled {len(ended)} jobs", *lines, more])
