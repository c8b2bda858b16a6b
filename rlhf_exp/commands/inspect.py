"""Commands that read the store: `rlhf-exp status`, `compare`, `report`, `figures`; and `cancel`.

`status` lists runs with their jobs, `compare` shows how two runs or groups of runs differ, `report`
writes the page of a run or of several, `figures` writes a run's charts as SVG files, `cancel` ends
the Slurm jobs of a name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from rlhf_exp.report.chart import duration
from rlhf_exp.report.run.charts import write_sheets
from rlhf_exp.report.run.gather import gather
from rlhf_exp.report.run.page import build_report, report_path
from rlhf_exp.report.sweep.compare import ComparedSide, MetricRow, RunComparison, compare_sides
from rlhf_exp.report.sweep.data import FEWEST_SEEDS, SeedSummary, Sweep
from rlhf_exp.report.sweep.gather import gather_sweep
from rlhf_exp.report.sweep.page import build_sweep_report, to_csv, to_json
from rlhf_exp.run_log import log_path
from rlhf_exp.search.study import study_exists
from rlhf_exp.store.disk_usage import sizes
from rlhf_exp.store.run_records import RunRecord, Status
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.progress_bar import Progress

HEADER = (
    *("name", "state", "stage", "step", "left", "begun", "reward", "KL", "objective", "key"),
    "command line or error",
)
# The validation metrics of the policies that a run makes, the last one first.
_POLICIES = ("ppo", "dpo")
_REWARDS = ("eval/reward_mean", "reward/mean")
_KLS = ("eval/kl_sequence", "kl/sequence")
# Of the table; `--json` has all of it.
_LONGEST_COMMAND = 100
# Well below the limits of file systems.
_MAX_FILE_NAME = 80


@dataclass(frozen=True)
class RunState:
    """A run as `status` shows it.

    Attributes:
        name: The run's name.
        state: How far it is.
        stage: The stage that was asked for; of a run in progress, the one it is in.
        key: The final key.
        begun: ISO 8601 time in UTC; empty for a job that waits.
        objective: The number that a sweep optimises.
        reward: Mean validation reward of the policy; of a run in progress, the latest.
        kl: Its KL to the SFT policy on the same answers, in nats per answer.
        progress: How far the stage in progress is.
        note: The error's last line, or what else is to be said.
        overrides: The command line.
        log: The file with its output, if it failed and has one.
    """

    name: str
    state: str
    stage: str
    key: str
    begun: str = ""
    objective: float | None = None
    reward: float | None = None
    kl: float | None = None
    progress: Progress | None = None
    note: str = ""
    overrides: tuple[str, ...] = ()
    log: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        progress, step, left = self.progress, "", ""
        if progress is not None:
            step = f"{progress.step}/{progress.steps}"
            left = "" if progress.seconds_left is None else duration(progress.seconds_left)
        begun = self.begun[:16].replace("T", " ")
        numbers = (self.reward, self.kl, self.objective)
        command = " ".join(self.overrides)
        if len(command) > _LONGEST_COMMAND:
            command = f"{command[: _LONGEST_COMMAND - 1]}…"
        told = self.note or command
        label = self.stage if progress is None else progress.label
        cells = (self.name, self.state, label, step, left, begun)
        return (*cells, *map(_number_text, numbers), self.key, told)


def _number_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def status(outputs: Path, run: str | None, form: str = "text") -> str:
    """Return the runs as a table, or as JSON: states, progress, results, command line or error.

    Args:
        outputs: The output folder.
        run: A run or multirun; None: all.
        form: `text` or `json`.
    """
    folder = OutputFolder(outputs)
    records, names = folder.records, submitted_names(outputs)
    if run is not None and form == "text" and study_exists(study_folder(outputs, run)):
        return study_text(outputs, run)
    if run is None:
        listed = records.all()
    elif run in names:
        listed, names = records.sweep(run), [run]
    else:
        listed, names = records.resolve_all(run, folder.store), []
    views = {(name, view.job.key): view for name in names for view in job_views(outputs, name)}
    states = [
        _record_state(folder, record, views.pop((record.name, record.key), None))
        for record in listed
    ]
    states += [_job_state(name, view) for (name, _), view in views.items()]
    if form == "json":
        shown = [
            {name: _json_value(value) for name, value in asdict(one).items()} for one in states
        ]
        return json.dumps(shown, indent=1, default=str, allow_nan=False) + "\n"
    if not states:
        return "no runs yet\n"
    text = table(HEADER, [state.cells for state in states])
    if run is not None:
        known = sorted({state.name for state in states} & set(records.names()))
        for usage in sizes(folder.store, records, known):
            text += f"\nDisk space of {usage.name}: {usage}\n"
    logs = [f"{state.key}: {state.log}\n" for state in states if state.log]
    return text + ("\nLogs of what failed:\n" + "".join(logs) if logs else "")


def _json_value(value: object) -> object:
    """Return a value of a state as JSON has it: what diverged is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record_state(folder: OutputFolder, record: RunRecord, view: JobView | None) -> RunState:
    state, note = str(record.status), _last_line(record.error)
    if record.abandoned:
        state, note = str(Status.interrupted), "its process was killed; the same command goes on"
    if view is not None and record.status is not Status.done:
        # A killed job could not update its record.
        state, note = str(view.progress), view.note or note
    log = record.log if view is None else str(view.log)
    progress = _progress_of(folder.store, record) if state == Status.running else None
    numbers = _policy_metrics(folder.store, record)
    if progress is not None and progress.label in _POLICIES:
        numbers = progress.numbers  # not those of another policy that is done
    return RunState(
        record.name,
        state,
        record.stage,
        record.key,
        record.created,
        record.objective,
        _first_of(numbers, _REWARDS),
        _first_of(numbers, _KLS),
        progress,
        note,
        record.overrides,
        log or "" if state == Status.failed else "",
    )


def _progress_of(store: Store, record: RunRecord) -> Progress | None:
    """Return the progress of the stage that a run is in, as it was last told."""
    for stage, key in reversed(record.keys.items()):
        unfinished = store.unfinished(stage, key)
        progress = None if unfinished is None else Progress.read(unfinished)
        if progress is not None:
            return progress
    return None


def _policy_metrics(store: Store, record: RunRecord) -> dict[str, float]:
    """Return the validation metrics of the policy that a run has made, if it has."""
    for stage in _POLICIES:
        key = record.keys.get(stage)
        artifact = None if key is None else store.lookup(stage, key)
        if artifact is not None:
            return dict(artifact.manifest.metrics)
    return {}


def _first_of(numbers: Mapping[str, float], names: Sequence[str]) -> float | None:
    return next((numbers[name] for name in names if name in numbers), None)


def _job_state(name: str, view: JobView) -> RunState:
    """Return the state of a job without a record: not started yet, or shared by several runs."""
    job, note = view.job, view.note
    if job.shared:
        note = f"shared by the points{f': {view.note}' if view.note else ''}"
    log = str(view.log) if view.progress == "failed" else ""
    return RunState(
        name,
        str(view.progress),
        job.stage,
        job.key,
        note=note,
        overrides=tuple(job.overrides),
        log=log,
    )


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


def compare(outputs: Path, first: str, second: str, form: str = "text") -> str:
    """Return the differences between two runs or groups of runs.

    Args:
        outputs: The output folder.
        first: A run, the name of several, or `NAME:KEY=VALUE,...`.
        second: The other side, given in the same way.
        form: `text`, `json` or `csv`.
    """
    folder = OutputFolder(outputs)
    comparison = compare_sides(_compared_side(folder, first), _compared_side(folder, second))
    if form == "json":
        return json.dumps(_to_json(comparison), indent=1, allow_nan=False) + "\n"
    return _to_csv(comparison) if form == "csv" else _to_text(comparison)


def _compared_side(folder: OutputFolder, name: str) -> ComparedSide:
    """Return the artifacts of one side's runs, without those that are not done, and their number.

    Raises:
        UserError: No run of several is done, or a single run has no results.
    """
    records = folder.select(name)
    if len(records) == 1:
        return ComparedSide(name, (folder.artifacts_of(records[0], name),))
    done = [record for record in records if record.status is Status.done]
    if not done:
        raise UserError(f"{name}: none of its {len(records)} runs is done; see rlhf-exp status")
    runs = tuple(folder.artifacts_of(record, f"{record.name}/{record.key}") for record in done)
    return ComparedSide(name, runs, unfinished=len(records) - len(done))


def _to_text(comparison: RunComparison) -> str:
    names = (f"A: {comparison.a.name}", f"B: {comparison.b.name}")
    parts = ["".join(f"{note}\n" for note in comparison.notes)]
    if comparison.config:
        parts.append(table(("config", *names), comparison.config))
    else:
        parts.append("The configs are the same.\n")
    several = len(comparison.a.runs) > 1 or len(comparison.b.runs) > 1
    if comparison.metrics:
        extra_columns = ("95 % interval over runs",) if several else ()
        rows = [_metric_row(row, several) for row in comparison.metrics]
        parts.append(table(("result", *names, "B - A", *extra_columns), rows))
    if comparison.paired:
        title = f"B - A over the same {comparison.prompts} prompts"
        rows = [
            (label, f"{difference.mean:+.4g}", f"{difference.low:+.4g} to {difference.high:+.4g}")
            for label, difference in comparison.paired
        ]
        parts.append(table((title, "mean", "95 % interval"), rows))
    return "\n".join(part for part in parts if part)


def _metric_row(row: MetricRow, several: bool) -> tuple[str, ...]:
    cells = (row.name, _summary_text(row.a), _summary_text(row.b), f"{row.difference.mean:+.4g}")
    if not several:
        return cells
    low, high = row.difference.low, row.difference.high
    if row.shared:
        return (*cells, "the same results")
    has_interval = math.isfinite(low) and math.isfinite(high)
    return (
        *cells,
        f"{low:+.4g} to {high:+.4g}" if has_interval else f"needs {FEWEST_SEEDS} runs of each",
    )


def _summary_text(summary: SeedSummary) -> str:
    mean, values = summary.estimate.mean, summary.values
    if len(values) == 1:
        return f"{mean:.4g}"
    if summary.has_interval:
        low, high = summary.estimate.low, summary.estimate.high
        return f"{mean:.4g} [{low:.4g}, {high:.4g}] ({len(values)})"
    return f"{mean:.4g} ({', '.join(f'{value:.4g}' for value in values)})"


def _to_json(comparison: RunComparison) -> dict[str, Any]:
    return {
        "a": {
            "name": comparison.a.name,
            "runs": comparison.a.keys,
            "unfinished": comparison.a.unfinished,
        },
        "b": {
            "name": comparison.b.name,
            "runs": comparison.b.keys,
            "unfinished": comparison.b.unfinished,
        },
        "notes": list(comparison.notes),
        "config": [{"key": key, "a": a, "b": b} for key, a, b in comparison.config],
        "metrics": [
            {
                "name": row.name,
                "a": row.a.to_json(),
                "b": row.b.to_json(),
                "difference": estimate_to_json(row.difference),
            }
            for row in comparison.metrics
        ],
        "prompts": {
            "count": comparison.prompts,
            "differences": {
                label: estimate_to_json(difference) for label, difference in comparison.paired
            },
        },
    }


def _to_csv(comparison: RunComparison) -> str:
    """Return a line for each difference in config, in metrics, on the same prompts."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("kind", "name", "a", "b", "difference", "low", "high", "n_a", "n_b"))
    for key, a, b in comparison.config:
        writer.writerow(("config", key, a, b, "", "", "", "", ""))
    for row in comparison.metrics:
        numbers = (row.a.estimate.mean, row.b.estimate.mean, row.difference.mean)
        counts = (len(row.a.values), len(row.b.values))
        bounds = map(_finite_or_empty, (row.difference.low, row.difference.high))
        writer.writerow(("metric", row.name, *numbers, *bounds, *counts))
    for label, difference in comparison.paired:
        bounds = map(_finite_or_empty, (difference.low, difference.high))
        writer.writerow(
            (
                "prompts",
                label,
                "",
                "",
                difference.mean,
                *bounds,
                comparison.prompts,
                comparison.prompts,
            )
        )
    return buffer.getvalue()


def _finite_or_empty(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def report(outputs: Path, runs: Sequence[str], form: str, kl_budget: float | None = None) -> str:
    """Write a report of runs and return its path, or return the runs as JSON or CSV.

    Args:
        outputs: The output folder.
        runs: Names of runs; a single run has the page of a run, several share one.
        form: `page`, `json` or `csv`.
        kl_budget: In nats per answer; runs are judged by their highest validation reward within it.
    """
    folder = OutputFolder(outputs)
    records = list({record.key: record for run in runs for record in folder.select(run)}.values())
    if form == "page" and len(records) == 1:
        return f"{write_run_report(folder, records[0], runs[0])}\n"
    sweep = sweep_of(folder, ", ".join(dict.fromkeys(runs)), records, kl_budget)
    if form == "json":
        return json.dumps(to_json(sweep), indent=1, allow_nan=False) + "\n"
    if form == "csv":
        return to_csv(sweep)
    path = outputs / "reports" / f"sweep-{_file_name(runs)}.html"
    return f"{build_sweep_report(sweep, path).resolve()}\n"


def sweep_of(
    folder: OutputFolder, title: str, records: Sequence[RunRecord], kl_budget: float | None = None
) -> Sweep:
    """Return the data of a report of several runs, with the logs of their jobs."""
    files = {record.key: log_path(folder.path, record.name, record.key) for record in records}
    logs = {key: str(path) for key, path in files.items() if path.is_file()}
    for name in {record.name for record in records} & set(submitted_names(folder.path)):
        logs |= {view.job.key: str(view.log) for view in job_views(folder.path, name)}
    return gather_sweep(title, records, folder.store, folder.records, logs, kl_budget)


def write_run_report(folder: OutputFolder, record: RunRecord, run: str) -> Path:
    """Write the page of one run and return its path; errors name the run `run`."""
    artifacts = folder.artifacts_of(record, run)
    final = list(artifacts.values())[-1]
    path = report_path(folder.path, final.stage, final.key)
    return build_report(gather(record.name, artifacts), path).resolve()


def _file_name(runs: Sequence[str]) -> str:
    """Return a readable file name that differs for every set of runs."""
    text = "+".join(runs)
    safe = re.sub(r"[^A-Za-z0-9_.+=-]", "_", text)
    if safe == text and len(text) <= _MAX_FILE_NAME:
        return text
    return f"{safe[:_MAX_FILE_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_figures(outputs: Path, run: str, folder: Path) -> list[Path]:
    """Write the charts of a run into `folder`, one file for each stage, and return their paths."""
    output_folder = OutputFolder(outputs)
    data = gather(output_folder.run(run).name, output_folder.artifacts(run))
    return write_sheets(
        data.metrics, folder, data.calibration, data.kl_target, data.published_steps
    )


def cancel(outputs: Path, name: str) -> str:
    """Cancel the unfinished Slurm jobs of a name and return a list of them.

    Raises:
        UserError: The name has no jobs, or Slurm refuses.
    """
    names = submitted_names(outputs)
    if name not in names:
        available = (
            f"names with jobs: {', '.join(names)}" if names else "no jobs were submitted yet"
        )
        raise UserError(f"cancel {name}: no Slurm jobs below {outputs}; {available}")
    cancelled = monitor.cancel_by_name(outputs, name)
    if not cancelled:
        return f"{name}: no job is in the queue\n"
    lines = [
        f"  {view.job.id}  {view.progress}  {view.job.stage} {view.job.key}" for view in cancelled
    ]
    resume_note = "What they have done is kept: the command that started them goes on.\n"
    return "\n".join([f"{name}: cancelled {len(cancelled)} jobs", *lines, resume_note])
