"""The capability section: tasks of lm-evaluation-harness, each model beside the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.evaluation.preference import (
    DASH,
    Metric,
    estimate_from_json,
    format_estimate,
    table_row,
)
from rlhf_exp.report.template import fill
from rlhf_exp.safe_text import visible

Plain = Mapping[str, Any]

HARNESS_FILE = "harness.json"
_MARKS = {"better": "✓ ", "worse": "✗ ", "unclear": "", "": ""}
_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}


def render(plain: Plain) -> Markup:
    """Return the section's content.

    Args:
        plain: The file of the harness part.
    """
    return fill(
        "run/harness.html",
        plain=plain,
        baseline=plain["models"][0],
        others=plain["models"][1:],
        rows=[_row(task, plain["models"]) for task in plain["tasks"]],
        how=how_asked(plain),
        unpaired=any(not task["paired"] for task in plain["tasks"]),
    )


def print_harness(plain: Plain, console: Console) -> None:
    """Print each task's numbers; names are untrusted and put in as text."""
    baseline, *others = plain["models"]
    table = Table(title=f"Capability, lm-eval {visible(plain['version'])}, {how_asked(plain)}")
    table.add_column("task")
    for name in (baseline, *(name for other in others for name in (other, "difference"))):
        table.add_column(Text(visible(name)), justify="right")
    for task in plain["tasks"]:
        row = _row(task, plain["models"])
        cells = [Text(visible(row["baseline"].replace(" [", "\n[")))]
        for cell in row["models"]:
            cells.append(Text(visible(cell["value"].replace(" [", "\n["))))
            words = _MARKS[cell["verdict"]] + cell["difference"].replace(" [", "\n[")
            cells.append(Text(visible(words), style=_STYLES[cell["verdict"]]))
        table.add_row(Text(visible(row["task"])), *cells)
    console.print(table)


def how_asked(plain: Plain) -> str:
    """Return how the tasks were asked, in words."""
    shots = plain["few_shot"]
    words = "each task's own examples" if shots is None else f"{shots} examples"
    if plain["limit"] is not None:
        words += f", at most {plain['limit']} documents a task"
    return words + (", in the chat template" if plain["chat_template"] else "")


def _row(task: Plain, models: list[str]) -> dict[str, Any]:
    """Return a task's numbers in words, with the same number of decimals in all columns."""
    baseline, *others = models
    own = estimate_from_json(task["values"][baseline])
    cells = []
    first = format_estimate(own)
    for name in others:
        value = estimate_from_json(task["values"][name])
        difference = estimate_from_json(task["differences"][name])
        metric = Metric("", "", task["better"], own, value, difference)
        words = table_row(metric)
        first = words.a
        cells.append(
            {
                "name": name,
                "value": words.b,
                "difference": words.difference or DASH,
                "verdict": metric.verdict,
            }
        )
    arrow = {"higher": "", "lower": ", lower is better", "neither": ""}[task["better"]]
    return {
        "task": f"{task['task']}, {task['metric']}{arrow}",
        "documents": task["documents"],
        "baseline": first,
        "models": cells,
    }
