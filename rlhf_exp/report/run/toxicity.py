"""The toxicity section: continuations by model and kind of prompt, and the scorer's agreement.

Its charts show a dot with an interval for each model and kind of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.evaluation.answers import sampling_words
from rlhf_exp.evaluation.preference import Metric, format_estimate
from rlhf_exp.evaluation.statistics import Estimate
from rlhf_exp.evaluation.toxicity.summary import MEASURES, MeasureEstimate, Split, ToxicitySummary
from rlhf_exp.report import chart
from rlhf_exp.report.chart import nice_ticks, tick_labels
from rlhf_exp.report.run.verdict import FEWEST_PROMPTS
from rlhf_exp.report.template import fill
from rlhf_exp.safe_text import visible

TOXICITY_FILE = "toxicity.json"
FEWEST_DRAWN = 20
"""Kinds of fewer prompts are in the table only: their intervals would stretch the axis."""

_KINDS = {
    "all": "All prompts",
    "non_toxic": "Prompts scored below 0.5",
    "toxic": "Prompts scored 0.5 or more",
    "unknown": "Prompts without a score",
}
_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}
_TEXTS = {"prompts": "prompts", "continuations": "continuations", "both": "texts of both kinds"}
# Laid out for some 340 CSS pixels, as the line charts are.
_WIDTH, _LEFT, _RIGHT = 340.0, 8.0, 328.0
_HEAD, _ROW, _GAP, _AXIS = 18.0, 15.0, 8.0, 24.0
_COLOURS = 4


def render(plain: Mapping[str, Any]) -> Markup:
    """Return the section.

    Args:
        plain: The value of `ToxicitySummary.to_json`.
    """
    summary = ToxicitySummary.from_json(plain)
    names = measures_of(summary)
    charts = [
        dot_chart(
            label,
            summary.models,
            [
                ToxicityGroup(
                    _kind(split), [split.models[model][name].value for model in summary.models]
                )
                for split in summary.splits
                if split.name == "all" or split.prompts >= FEWEST_DRAWN
            ],
        )
        for name, label in names.items()
    ]
    return fill(
        "run/toxicity.html",
        summary=summary,
        headline=headline(summary),
        charts=charts,
        labels=list(names.values()),
        rows=rows_of(summary),
        setting=setting_of(summary),
        trust=trust_sentence(summary),
    )


def print_toxicity(plain: Mapping[str, Any], console: Console) -> None:
    """Print the measures over all prompts; names are untrusted and put in as text."""
    summary = ToxicitySummary.from_json(plain)
    table = Table(title=Text(visible(f"Toxicity of {setting_of(summary)}")))
    table.add_column("model")
    for label in measures_of(summary).values():
        table.add_column(label, justify="right")
    for row in rows_of(summary)[: len(summary.models)]:
        cells = [Text(cell.value) for cell in row.cells]
        for text, cell in zip(cells, row.cells, strict=True):
            if cell.difference:
                text.append(f"\n{cell.difference}", style=_STYLES[cell.verdict])
        table.add_row(Text(visible(row.model)), *cells)
    console.print(table)
    console.print(Text(visible(trust_sentence(summary))))


def measures_of(summary: ToxicitySummary) -> dict[str, str]:
    """Return the names of the measures present, with their labels for readers."""
    k = summary.generations
    labels = {
        "mean": "Mean toxicity",
        "expected_max": f"Expected maximum of {k}",
        "probability": f"At least one of {k} ≥ 0.5" if k > 1 else "Share ≥ 0.5",
    }
    measures = next(iter(summary.splits[0].models.values()))
    return {name: labels[name] for name in MEASURES if name in measures}


def headline(summary: ToxicitySummary) -> str:
    """Return the means in one sentence, hedged where a difference may be chance."""
    baseline, *others = summary.models
    values = {model: summary.splits[0].models[model]["mean"] for model in summary.models}
    start = f"Mean toxicity of {baseline}: {values[baseline].value.mean:.3f}"
    parts = []
    for model in others:
        words = {"better": "lower", "worse": "higher", "unclear": "no clear difference"}
        comparison = words[_verdict(values[model], summary.splits[0])]
        parts.append(f"{model} {values[model].value.mean:.3f} ({comparison})")
    return "; ".join([start, *parts]) + "."


def setting_of(summary: ToxicitySummary) -> str:
    """Return the setting in words: prompts, continuations, length, sampling."""
    prompts = summary.splits[0].prompts
    setting = (
        f"{summary.generations} continuation{'s' if summary.generations > 1 else ''} of each of "
    )
    setting += f"{prompts:,} prompts"
    if summary.temperature is not None:
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        setting += ", " + sampling_words({name: getattr(summary, name) for name in names})
    if summary.format is None:
        return f"{setting}, answers of an earlier evaluation"
    return setting if summary.format == "raw" else f"{setting}, asked as a turn of a dialogue"


def trust_sentence(summary: ToxicitySummary) -> str:
    """Return the scorer's name, and its agreement with the data set's own scores."""
    scores_by = f"Scores are by {summary.scorer}."
    agreements = []
    for agreement in summary.agreement:
        if agreement.auc is None:
            continue
        text = f"{agreement.auc:.3f} on {agreement.count:,} {_TEXTS[agreement.texts]}"
        agreements.append(
            text if agreement.spearman is None else f"{text} (Spearman {agreement.spearman:.2f})"
        )
    if not agreements:
        return f"{scores_by} The data have no scores of their own to compare them with."
    return (
        f"{scores_by} Probability that it ranks a text which the data set scores 0.5 or more above "
        f"one scored lower (AUC): {', '.join(agreements)}."
    )


def rows_of(summary: ToxicitySummary) -> list[ToxicityRow]:
    """Return the table's rows: for each kind of prompts, each model."""
    return [
        ToxicityRow(
            _kind(split),
            model,
            tuple(_cell(measures[name], split) for name in measures_of(summary)),
        )
        for split in summary.splits
        for model, measures in split.models.items()
    ]


def _kind(split: Split) -> str:
    return f"{_KINDS[split.name]} ({split.prompts:,})"


def _cell(measure: MeasureEstimate, split: Split) -> ToxicityCell:
    difference = (
        "" if measure.difference is None else format_estimate(measure.difference, 4, signed=True)
    )
    return ToxicityCell(format_estimate(measure.value, 3), difference, _verdict(measure, split))


def _verdict(measure: MeasureEstimate, split: Split) -> str:
    """Return whether a model is better or worse than the baseline, on prompts enough to tell."""
    if split.prompts < FEWEST_PROMPTS:
        return "" if measure.difference is None else "unclear"
    return Metric("", "", "lower", None, measure.value, measure.difference).verdict


@dataclass(frozen=True)
class ToxicityRow:
    """One model on one kind of prompts, a cell for each measure."""

    kind: str
    model: str
    cells: tuple[ToxicityCell, ...]


@dataclass(frozen=True)
class ToxicityCell:
    """A measure of one model: its value, difference from the baseline, and verdict."""

    value: str
    difference: str
    verdict: str


def dot_chart(title: str, models: Sequence[str], groups: Sequence[ToxicityGroup]) -> Markup:
    """Return a figure: below each group's label a row for each model, on one axis from 0."""
    top = max(_reach(value) for group in groups for value in group.values)
    scale = (_RIGHT - _LEFT) / top
    height = sum(_HEAD + _ROW * len(group.values) + _GAP for group in groups)
    marks, y = _grid(top, scale, height), 0.0
    for group in groups:
        marks.append(chart.element("text", group.label, x=_LEFT, y=y + 13, class_="tick start"))
        for number, value in enumerate(group.values):
            row = y + _HEAD + _ROW * (number + 0.5)
            marks += _dot(models[number], value, number, row, scale)
        y += _HEAD + _ROW * len(group.values) + _GAP
    drawing = chart.element(
        "svg",
        chart.element("title", _description(title, models, groups)),
        *marks,
        viewBox=f"0 0 {_WIDTH:.0f} {height + _AXIS:.0f}",
        role="img",
        class_="plot",
    )
    caption = chart.element("figcaption", title)
    return chart.element("figure", caption, _legend(models, groups), drawing, class_="chart")


def _reach(value: Estimate) -> float:
    """Return how far to the right a value goes, above 0."""
    high = value.high if value.high < float("inf") else value.mean
    return max(1.04 * max(high, value.mean), 1e-3)


def _grid(top: float, scale: float, height: float) -> list[Markup]:
    ticks = nice_ticks(0.0, top, target=4)
    marks = []
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        x = _LEFT + tick * scale
        anchor = "tick start" if x < _LEFT + 12 else "tick middle"
        marks.append(chart.element("line", x1=x, x2=x, y1=0, y2=height, class_="grid"))
        marks.append(chart.element("text", text, x=max(x, _LEFT), y=height + 16, class_=anchor))
    return marks


def _dot(model: str, value: Estimate, number: int, y: float, scale: float) -> list[Markup]:
    colour = f"s{number % _COLOURS}"
    low, high = (_LEFT + scale * min(max(end, 0.0), 1.0) for end in (value.low, value.high))
    title = chart.element("title", f"{model}: {format_estimate(value)}")
    marks = [
        chart.element("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {colour}"),
        chart.element(
            "circle", title, cx=_LEFT + scale * value.mean, cy=y, r=4, class_=f"dot {colour}"
        ),
    ]
    # An infinite interval is not drawn from end to end.
    return marks if value.high < float("inf") else marks[1:]


def _legend(models: Sequence[str], groups: Sequence[ToxicityGroup]) -> Markup:
    items = []
    for number, model in enumerate(models):
        swatch = chart.element("i", class_=f"swatch s{number % _COLOURS}")
        value = chart.element("b", f"{groups[0].values[number].mean:.3f}")
        items.append(chart.element("li", swatch, model, " ", value))
    return chart.element("ul", *items, class_="legend")


def _description(title: str, models: Sequence[str], groups: Sequence[ToxicityGroup]) -> str:
    """Return the chart in words, for those who cannot see it."""
    groups_in_words = [
        f"{group.label}: "
        + ", ".join(
            f"{model} {value.mean:.3f}" for model, value in zip(models, group.values, strict=True)
        )
        for group in groups
    ]
    return f"{title}. {'; '.join(groups_in_words)}"


@dataclass(frozen=True)
class ToxicityGroup:
    """The values of all models on one kind of prompts.

    Attributes:
        label: the kind, with the number of prompts.
        values: values of the models, in the order of the legend.
    """

    label: str
    values: Sequence[Estimate]
