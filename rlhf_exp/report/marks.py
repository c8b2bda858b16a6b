"""Lines of a chart as SVG marks: bands, running means, paths, whiskers, points to hover over.

Colours are the classes `s0` to `s3` of the page's style sheet.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from markupsafe import Markup

from rlhf_exp.report import svg
from rlhf_exp.report.chart import WIDTH, Axes, Line
from rlhf_exp.report.curves import Floats, thinned
from rlhf_exp.report.numbers import short

_MARKED = 16
_HOVERED = 60


def style(colour: int, dash: int) -> str:
    """Return the classes of a colour and a dash."""
    return f"s{colour} d{dash}" if dash else f"s{colour}"


def draw(line: Line, axes: Axes, pointed: bool = True) -> list[Markup]:
    """Return the marks of one line, what lies behind first.

    Args:
        line: What is drawn.
        axes: Where its numbers lie.
        pointed: Whether points show their numbers under a pointer.
    """
    if line.ordered:
        return _path(line, axes, pointed)
    found = []
    smooth, spread = line.smoothed, line.smoothed_spread
    colour = f"s{line.colour}"
    if line.band is not None:
        low, high = (axes.top(end) for end in line.band)
        found += svg.band(axes.left(line.x), low, high, class_=f"band {colour}")
    if spread is not None:
        x, low = thinned(line.x, smooth - spread)
        high = np.interp(x, line.x, smooth + spread)
        found += svg.band(axes.left(x), axes.top(low), axes.top(high), class_=f"band {colour}")
    elif line.window > 1:
        x, y = thinned(line.x, line.y)
        found += svg.polyline(axes.left(x), axes.top(y), class_=f"raw {colour}")
    if line.whiskers is not None:
        found += _whiskers(line.x, line.whiskers, axes, f"whisker {colour}")
    x, y = thinned(line.x, smooth)
    found += svg.polyline(axes.left(x), axes.top(y), class_=f"line {style(line.colour, line.dash)}")
    if line.disc is not None:
        spot = slice(line.disc, line.disc + 1)
        found += _dots(axes.left(line.x[spot]), axes.top(line.y[spot]), f"dot {colour}", 3.6)
    elif len(x) <= _MARKED:
        found += _dots(axes.left(x), axes.top(y), f"dot {colour}", 2.2)
    return found + (_hover(line, x, y, axes) if pointed else [])


def _path(line: Line, axes: Axes, pointed: bool) -> list[Markup]:
    """Draw a path whose later part is darker, with a ring at its start and a disc at its end."""
    found = []
    x, y = line.positions, line.smoothed
    parts = min(6, max(1, len(x) - 1))
    edges = np.linspace(0, len(x) - 1, parts + 1).round().astype(int)
    for part, (start, end) in enumerate(pairwise(edges)):
        age = round(5 * (part + 1) / parts)
        points = slice(start, end + 1)
        kind = f"line s{line.colour} age{age}"
        found += svg.polyline(axes.left(x[points]), axes.top(y[points]), class_=kind)
    left, top = axes.left(x), axes.top(y)
    found += _dots(left[:1], top[:1], f"ring s{line.colour}", 4)
    found += _dots(left[-1:], top[-1:], f"dot s{line.colour}", 4.5)
    for index, text, rise in ((0, "start", 4), (-1, "end", -9)):
        beyond = left[index] > WIDTH - 60
        shift, anchor = (4, "end") if beyond else (8, "start")
        spot = {"x": float(left[index]) + shift, "y": float(top[index]) + rise}
        found.append(svg.element("text", text, class_=f"tick strong {anchor}", **spot))
    return found + (_hover(line, x, y, axes) if pointed else [])


def _whiskers(x: Floats, ends: tuple[Floats, Floats], axes: Axes, kind: str) -> list[Markup]:
    lefts, lows, highs = axes.left(x), axes.top(ends[0]), axes.top(ends[1])
    return [
        svg.element("line", x1=float(left), x2=float(left), y1=float(a), y2=float(b), class_=kind)
        for left, a, b in zip(lefts, lows, highs, strict=True)
    ]


def _dots(xs: Floats, ys: Floats, kind: str, radius: float) -> list[Markup]:
    return [
        svg.element("circle", cx=float(x), cy=float(y), r=radius, class_=kind)
        for x, y in zip(xs, ys, strict=True)
        if np.isfinite(y)
    ]


def _hover(line: Line, x: Floats, y: Floats, axes: Axes) -> list[Markup]:
    """Return invisible points that show their numbers under a pointer."""
    index = np.unique(np.linspace(0, len(x) - 1, min(len(x), _HOVERED)).round().astype(int))
    found = []
    for place in index[np.isfinite(y[index])]:
        text = f"{line.label}, {line.unit} {short(float(x[place]))}: {short(float(y[place]))}"
        left, top = float(axes.left(x[place])), float(axes.top(y[place]))
        title = svg.element("title", text)
        kind = f"hover s{line.colour}"
        found.append(svg.element("circle", title, cx=left, cy=top, r=5, class_=kind))
    return found
