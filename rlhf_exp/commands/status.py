"""`rlhf-exp status`: the runs below an output folder, or the points of one."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.commands.text import table


def status(outputs: Path, run: str | None) -> str:
    """Return the runs as a table: name, state, stage, key, objective, command line or error."""
    records = Outputs(outputs).records
    found = records.all() if run is None else records.resolve_all(run, Outputs(outputs).store)
    rows = [
        (
            record.name,
            str(record.status),
            record.stage,
            record.key,
            "" if record.objective is None else f"{record.objective:.4g}",
            (record.error or "").strip().splitlines()[-1]
            if record.error
            else " ".join(record.overrides),
        )
        for record in found
    ]
    header = ("name", "state", "stage", "key", "objective", "command line or error")
    return table(header, rows) if rows else "no runs yet\n"
