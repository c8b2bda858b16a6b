"""`rlhf-exp compare A B`: how two runs, or two groups of runs, differ in config and results."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from rlhf_exp.commands.runs import Outputs
from rlhf_exp.commands.text import table
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.metric import estimate_to_json
from rlhf_exp.report.sweep.compared import Comparison, Row, Side, compared
from rlhf_exp.report.sweep.groups import FEWEST, Summary
from rlhf_exp.store.records import Status


def compare(outputs: Path, first: str, second: str, form: str = "text") -> str:
    """Return the differences between two runs or groups of runs.

    Args:
        outputs: The output folder.
        first: A run, the name of several, or `NAME:KEY=VALUE,...`.
        second: The other.
        form: `text`, `json` or `csv`.
    """
    found = Outputs(outputs)
    comparison = compared(_side(found, first), _side(found, second))
    if form == "json":
        return json.dumps(_to_json(comparison), indent=1, allow_nan=False) + "\n"
    return _to_csv(comparison) if form == "csv" else _to_text(comparison)


def _side(found: Outputs, name: str) -> Side:
    """Return the results of the runs of a side; those that are not done are left out and counted.

    Raises:
        UserError: None of several is done, or the only one has no results.
    """
    records = found.select(name)
    if len(records) == 1:
        return Side(name, (found.artifacts_of(records[0], name),))
    done = [one for one in records if one.status is Status.done]
    if not done:
        raise UserError(f"{name}: none of its {len(records)} runs is done; see rlhf-exp status")
    runs = tuple(found.artifacts_of(one, f"{one.name}/{one.key}") for one in done)
    return Side(name, runs, unfinished=len(records) - len(done))


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


def _metric_row(row: Row, several: bool) -> tuple[str, ...]:
    cells = (row.name, _words(row.a), _words(row.b), f"{row.difference.mean:+.4g}")
    if not several:
        return cells
    low, high = row.difference.low, row.difference.high
    if row.shared:
        return (*cells, "the same results")
    known = math.isfinite(low) and math.isfinite(high)
    return (*cells, f"{low:+.4g} to {high:+.4g}" if known else f"needs {FEWEST} runs of each")


def _words(summary: Summary) -> str:
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
