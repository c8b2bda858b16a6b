"""`rlhf-exp report`: the page of a run, of a sweep or of any set of runs, from the store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.report.gather import gather
from rlhf_exp.report.page import build_report
from rlhf_exp.report.sweep.data import Sweep
from rlhf_exp.report.sweep.export import to_csv, to_json
from rlhf_exp.report.sweep.gather import gather_sweep
from rlhf_exp.report.sweep.page import build_sweep_report
from rlhf_exp.slurm.overview import job_views
from rlhf_exp.slurm.submission import submitted_names
from rlhf_exp.store.records import RunRecord

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
    found = Outputs(outputs)
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
    found: Outputs, title: str, records: Sequence[RunRecord], kl_budget: float | None = None
) -> Sweep:
    """Return what is known of some runs, with the logs of their jobs."""
    files = {one.key: found.records.root / one.name / "logs" / f"{one.key}.log" for one in records}
    logs = {key: str(path) for key, path in files.items() if path.is_file()}
    for name in {one.name for one in records} & set(submitted_names(found.folder)):
        logs |= {view.job.key: str(view.log) for view in job_views(found.folder, name)}
    return gather_sweep(title, records, found.store, found.records, logs, kl_budget)


def _write_one(found: Outputs, record: RunRecord, run: str) -> Path:
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
