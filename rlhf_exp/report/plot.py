"""Line charts: a figure with a title, a legend of last values and one SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from rlhf_exp.report import svg
from rlhf_exp.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Chart
from rlhf_exp.report.curves import Floats, thinned
from rlhf_exp.report.marks import draw, style
from rlhf_exp.report.numbers import nice_ticks, tick_labels


def render(chart: Chart) -> Markup:
    """Return the figure: `<figure>` with caption, legend, drawing and note."""
    drawing = svg.element(
        "svg",
        svg.element("title", _spoken(chart)),
        *drawn(chart),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="plot",
    )
    note = svg.element("p", chart.note, class_="note") if chart.note else Markup("")
    caption = svg.element("figcaption", chart.title)
    return svg.element("figure", caption, _legend(chart), drawing, note, class_="chart")


def drawn(chart: Chart, pointed: bool = True) -> list[Markup]:
    """Return what the drawing consists of; `pointed`: with numbers under a pointer."""
    axes = Axes(*_ranges(chart))
    marks = (mark for line in chart.lines for mark in draw(line, axes, pointed))
    return [*_frame(chart, axes), *marks]


def sparkline(values: Floats) -> Markup:
    """Return a small drawing of [N] values without axes."""
    y = np.asarray(values, dtype=np.float64)
    x, y = thinned(np.arange(len(y), dtype=np.float64), y, most=80)
    low, high = _widened(*_extent([y]))
    tops = 17 - (y - low) / (high - low) * 14
    lines = svg.polyline(2 + x / max(1.0, x[-1]) * 92, tops, class_="line s0")
    return svg.element("svg", *lines, viewBox="0 0 96 20", class_="spark", aria_hidden="true")


def _ranges(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    heights = [np.asarray(chart.include, float), np.array([value for value, _ in chart.levels])]
    for line in chart.lines:
        heights.append(line.smoothed if line.ordered else line.y)
        if line.smoothed_spread is not None:
            heights += [line.smoothed - line.smoothed_spread, line.smoothed + line.smoothed_spread]
        if line.whiskers is not None:
            heights += line.whiskers
        if line.band is not None:
            heights += line.band
    widths = [line.positions for line in chart.lines]
    widths.append(np.array([value for value, _ in chart.marks_x]))
    low, high = _widened(*_extent(widths), share=0.0)
    if any(line.ordered for line in chart.lines) or chart.diagonal:
        low, high = _widened(low, high)
    return (low, high), chart.y_range or _widened(*_extent(heights))


def _extent(arrays: Sequence[Floats]) -> tuple[float, float]:
    values = np.concatenate([np.asarray(array, float).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _widened(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    """Return the range with a margin; a range of one value gets one on both sides."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        margin = 0.1 * abs(low) or 1.0
    else:
        margin = share * (high - low)
    return low - margin, high + margin


def _frame(chart: Chart, axes: Axes) -> list[Markup]:
    """Return grid, tick labels, axis label and reference lines."""
    found = []
    ticks = nice_ticks(*axes.y)
    for y, text in zip(axes.top(np.array(ticks)), tick_labels(ticks), strict=True):
        found.append(svg.element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        found.append(svg.element("text", text, x=LEFT - 6, y=y + 4, class_="tick end"))
    ticks = nice_ticks(*axes.x, target=4)
    found.append(svg.element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    for x, text in zip(axes.left(np.array(ticks)), tick_labels(ticks), strict=True):
        found.append(svg.element("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="axis"))
        anchor = "tick end" if x > RIGHT - 12 else "tick middle"
        found.append(svg.element("text", text, x=min(x, RIGHT), y=BOTTOM + 16, class_=anchor))
    centre = (LEFT + RIGHT) / 2
    found.append(svg.element("text", chart.x_label, x=centre, y=HEIGHT - 5, class_="label middle"))
    for value, text in chart.levels:
        y = float(axes.top(np.array(value)))
        found.append(svg.element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="level"))
        found.append(svg.element("text", text, x=RIGHT, y=y - 4, class_="tick end"))
    for value, text in chart.marks_x:
        x = float(axes.left(np.array(value)))
        found.append(svg.element("line", x1=x, x2=x, y1=TOP, y2=BOTTOM, class_="level"))
        side, place = ("end", x - 4) if x > centre else ("start", x + 4)
        found.append(svg.element("text", text, x=place, y=TOP + 8, class_=f"tick {side}"))
    if chart.diagonal:
        ends = np.array([max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])])
        found += svg.polyline(axes.left(ends), axes.top(ends), class_="level")
    return found


def _legend(chart: Chart) -> Markup:
    keys = chart.keys
    if keys is None:
        keys = [(line.label, line.colour, line.dash, line.ending) for line in chart.lines]
    items = []
    for label, colour, dash, ending in keys:
        swatch = svg.element("i", class_=f"swatch {style(colour, dash)}")
        items.append(svg.element("li", swatch, label, " ", svg.element("b", ending)))
    return svg.element("ul", *items, class_="legend")


def _spoken(chart: Chart) -> str:
    """Return the chart in words, for those who cannot see it."""
    ends = "; ".join(f"{line.label} ends at {line.ending}" for line in chart.lines)
    return f"{chart.title} over {chart.x_label}: {ends}"
