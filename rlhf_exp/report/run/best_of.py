"""The best-of-n section: the curve that every method has to beat, and where the models stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.evaluation.preference import estimate_from_json, format_estimate
from rlhf_exp.evaluation.statistics import Estimate
from rlhf_exp.report.chart import Chart, LineSeries, short
from rlhf_exp.report.chart import render as draw
from rlhf_exp.report.template import fill
from rlhf_exp.safe_text import visible

Plain = Mapping[str, Any]

BEST_OF_FILE = "best_of.json"
_UNDRAWN = "length"
_COLOURS = 4


def render(plain: Plain) -> Markup:
    """Return the section's content.

    Args:
        plain: The file of the best-of-n part.
    """
    return fill(
        "run/best_of.html",
        plain=plain,
        measures=plain["measures"],
        points=[_point_row(point, plain["measures"]) for point in plain["points"]],
        models=[_model_row(model, plain["measures"]) for model in plain["models"]],
        leads=[lead_sentence(model, plain) for model in plain["models"]],
        distinct=f"{100 * plain['distinct']:.0f}\N{NO-BREAK SPACE}%",
        charts=[draw(chart) for chart in frontier_charts(plain)],
    )


def print_best_of(plain: Plain, console: Console) -> None:
    """Print the curve and the models beside it; names are untrusted and put in as text."""
    measures = plain["measures"]
    title = f"Best of n by the {plain['judge']}, {plain['prompts']} prompts"
    table = Table(title=Text(visible(title)))
    table.add_column("answers of")
    for name in ("KL, nats", *(measure["label"] for measure in measures)):
        table.add_column(Text(visible(name)), justify="right")
    for row in (
        *(_point_row(point, measures) for point in plain["points"]),
        *(_model_row(model, measures) for model in plain["models"]),
    ):
        values = (Text(value.replace(" [", "\n[")) for value in row["values"])
        table.add_row(Text(visible(row["label"])), row["kl"].partition(" [")[0], *values)
    console.print(table)
    for model in plain["models"]:
        console.print(Text(visible(lead_sentence(model, plain))))


def frontier_charts(plain: Plain) -> list[Chart]:
    """Return a chart for each measure but length: best-of-n, and each model, against √KL."""
    return [
        _chart(measure, plain["points"], plain["models"])
        for measure in plain["measures"]
        if measure["key"] != _UNDRAWN
    ]


def _chart(measure: Plain, points: Sequence[Plain], models: Sequence[Plain]) -> Chart:
    key = measure["key"]
    curve = [_estimate(point["values"][key]) for point in points]
    distance = [point["kl"] for point in points]
    lines = [_line("best of n", distance, curve, 0)]
    lines += [
        _line(model["name"], [model["kl"]["mean"]], [_estimate(model["values"][key])], number)
        for number, model in enumerate(models, start=1)
        if key in model["values"]
    ]
    return Chart(measure["label"], lines, x_label="√KL, KL in nats per answer")


def _line(label: str, kl: Sequence[float], values: Sequence[Estimate], number: int) -> LineSeries:
    low, mean, high = (
        np.array([getattr(value, end) for value in values]) for end in ("low", "mean", "high")
    )
    return LineSeries(
        label,
        np.sqrt(np.maximum(np.array(kl), 0.0)),
        mean,
        number % _COLOURS,
        smooth=False,
        unit="√KL",
        whiskers=(np.where(np.isfinite(low), low, mean), np.where(np.isfinite(high), high, mean)),
        last=short(float(mean[-1])),
    )


def lead_sentence(model: Plain, plain: Plain) -> str:
    """Return where a model stands to the curve, in one sentence."""
    lead = _estimate(model["over"]["reward"])
    where = "best of n at the same KL"
    if model["beyond"]:
        where = f"best of {plain['samples']}, which costs less KL"
    words = format_estimate(lead, signed=True)
    if not lead.excludes_zero:
        return f"{model['name']} is level with {where}: {words} of reward."
    side = "above" if lead.mean > 0 else "below"
    return f"{model['name']} is {side} {where}: {words} of reward."


def _point_row(point: Plain, measures: Sequence[Plain]) -> dict[str, Any]:
    label = "one answer" if point["n"] == 1 else f"best of {point['n']}"
    return _row(label, short(point["kl"]), point["values"], measures)


def _model_row(model: Plain, measures: Sequence[Plain]) -> dict[str, Any]:
    return _row(model["name"], format_estimate(_estimate(model["kl"])), model["values"], measures)


def _row(label: str, kl: str, values: Plain, measures: Sequence[Plain]) -> dict[str, Any]:
    known = (values.get(measure["key"]) for measure in measures)
    return {
        "label": label,
        "kl": kl,
        "values": [format_estimate(estimate_from_json(value)) for value in known],
    }


def _estimate(plain: Plain) -> Estimate:
    estimate = estimate_from_json(plain)
    assert estimate is not None, "the part writes none without"
    return estimate
