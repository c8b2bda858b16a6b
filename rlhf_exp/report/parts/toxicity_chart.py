"""Measures of several models on kinds of prompts: a dot with its interval for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlhf_exp.evaluation.metric import format_estimate
from rlhf_exp.evaluation.statistics import Estimate
from rlhf_exp.report import svg
from rlhf_exp.report.numbers import nice_ticks, tick_labels

# Laid out for some 340 CSS pixels, as the line charts are.
_WIDTH, _LEFT, _RIGHT = 340.0, 8.0, 328.0
_HEAD, _ROW, _GAP, _AXIS = 18.0, 15.0, 8.0, 24.0
_COLOURS = 4


@dataclass(frozen=True)
class Group:
    """The values of all models on one kind of prompts.

    Attributes:
        label: the kind, with the number of prompts.
        values: of each model, in the order of the legend.
    """

    label: str
    values: Sequence[Estimate]


def dot_chart(title: str, models: Sequence[str], groups: Sequence[Group]) -> Markup:
    """Return a figure: below each group's label a row for each model, on one axis from 0."""
    top = max(_reach(value) for group in groups for value in group.values)
    scale = (_RIGHT - _LEFT) / top
    height = sum(_HEAD + _ROW * len(group.values) + _GAP for group in groups)
    marks, y = _grid(top, scale, height), 0.0
    for group in groups:
        marks.append(svg.element("text", group.label, x=_LEFT, y=y + 13, class_="tick start"))
        for number, value in enumerate(group.values):
            row = y + _HEAD + _ROW * (number + 0.5)
            marks += _dot(models[number], value, number, row, scale)
        y += _HEAD + _ROW * len(group.values) + _GAP
    drawing = svg.element(
        "svg",
        svg.element("title", _spoken(title, models, groups)),
        *marks,
        viewBox=f"0 0 {_WIDTH:.0f} {height + _AXIS:.0f}",
        role="img",
        class_="plot",
    )
    caption = svg.element("figcaption", title)
    return svg.element("figure", caption, _legend(models, groups), drawing, class_="chart")


def _reach(value: Estimate) -> float:
    """Return how far to the right a value goes, above 0."""
    high = value.high if value.high < float("inf") else value.mean
    return max(1.04 * max(high, value.mean), 1e-3)


def _grid(top: float, scale: float, height: float) -> list[Markup]:
    ticks = nice_ticks(0.0, top, target=4)
    found = []
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        x = _LEFT + tick * scale
        anchor = "tick start" if x < _LEFT + 12 else "tick middle"
        found.append(svg.element("line", x1=x, x2=x, y1=0, y2=height, class_="grid"))
        found.append(svg.element("text", text, x=max(x, _LEFT), y=height + 16, class_=anchor))
    return found


def _dot(model: str, value: Estimate, number: int, y: float, scale: float) -> list[Markup]:
    colour = f"s{number % _COLOURS}"
    low, high = (_LEFT + scale * min(max(end, 0.0), 1.0) for end in (value.low, value.high))
    title = svg.element("title", f"{model}: {format_estimate(value)}")
    found = [
        svg.element("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {colour}"),
        svg.element(
            "circle", title, cx=_LEFT + scale * value.mean, cy=y, r=4, class_=f"dot {colour}"
        ),
    ]
    # An interval that says nothing is not drawn from end to end.
    return found if value.high < float("inf") else found[1:]


def _legend(models: Sequence[str], groups: Sequence[Group]) -> Markup:
    items = []
    for number, model in enumerate(models):
        swatch = svg.element("i", class_=f"swatch s{number % _COLOURS}")
        value = svg.element("b", f"{groups[0].values[number].mean:.3f}")
        items.append(svg.element("li", swatch, model, " ", value))
    return svg.element("ul", *items, class_="legend")


def _spoken(title: str, models: Sequence[str], groups: Sequence[Group]) -> str:
    """Return the chart in words, for those who cannot see it."""
    said = [
        f"{group.label}: "
        + ", ".join(
            f"{model} {value.mean:.3f}" for model, value in zip(models, group.values, strict=True)
        )
        for group in groups
    ]
    return f"{title}. {'; '.join(said)}"
