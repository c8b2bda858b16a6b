"""Line charts as SVG: from rows of logged metrics to a figure with title, legend and drawing.

A drawing is laid out for a width of about 340 CSS pixels, the width of a phone and of a third of a
laptop's screen, so that its text keeps its size on both. Geometry is in attributes, looks are in
the page's style sheet: colours are its classes `s0` to `s3`. No `style` attribute is ever written:
the page's security policy would refuse it.

Legend: N points of a curve. NaN in y is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.evaluation.preference import DASH, MINUS
from rlhf_exp.safe_text import visible

Floats = NDArray[np.float64]
Row = Mapping[str, float]
Value = str | float | int
STEP = "global_step"
STEPS = "optimizer step"
"""Label of the axis of steps."""
WIDTH, HEIGHT = 340, 212
LEFT, RIGHT, TOP, BOTTOM = 44, WIDTH - 12, 10, HEIGHT - 36
SMOOTH_ABOVE = 60
_WINDOWS_PER_CURVE = 25
_MOST_POINTS = 400
_MOST_DOTS = 16
_MOST_HOVER_POINTS = 60


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        title: the quantity shown, with its unit.
        lines: at least one.
        x_label: label of the horizontal axis.
        note: one sentence below the drawing.
        include: y values that the axis must reach.
        levels: (value, label) of horizontal reference lines.
        diagonal: draw the line y = x.
        marks_x: (value, label) of vertical reference lines.
        keys: (label, colour, dash, value) of the legend, where it is not one entry a line.
        y_range: range of the vertical axis, for charts to be compared; by default that of the data.
    """

    title: str
    lines: Sequence[LineSeries]
    x_label: str = STEPS
    note: str = ""
    include: Sequence[float] = field(default_factory=tuple)
    levels: Sequence[tuple[float, str]] = field(default_factory=tuple)
    diagonal: bool = False
    marks_x: Sequence[tuple[float, str]] = field(default_factory=tuple)
    keys: Sequence[tuple[str, int, int, str]] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class LineSeries:
    """One curve of a chart.

    Attributes:
        label: its name in the legend.
        x: [N] positions.
        y: [N] values; NaN is a gap.
        colour: number of the colour class, 0 to 3; to 5 where the page's style has them.
        spread: [N] half the height of the band around it, or `None`.
        whiskers: (low [N], high [N]) of an interval drawn at each point, or `None`.
        smooth: draw a running mean where points are many, and the points themselves faintly.
        ordered: draw as a path through the points in their order, marking its start and its end.
        unit: unit of x in the text under a pointer.
        last: text of the legend's value; the last y by default.
        dash: number of the dash class, 0 to 3; 0 leaves it to the colour.
        band: (low [N], high [N]) of an interval drawn as an area, or `None`.
        disc: index of the one point that is marked, as the published one; by default all points
            are where they are few.
    """

    label: str
    x: Floats
    y: Floats
    colour: int = 0
    spread: Floats | None = None
    whiskers: tuple[Floats, Floats] | None = None
    smooth: bool = True
    ordered: bool = False
    unit: str = "step"
    last: str | None = None
    dash: int = 0
    band: tuple[Floats, Floats] | None = None
    disc: int | None = None

    @property
    def window(self) -> int:
        """Points that the running mean takes together; 1 draws the points as they are."""
        return window_of(len(self.y)) if self.smooth else 1

    @property
    def positions(self) -> Floats:
        """Return the positions as drawn: [N]; a path is smoothed in both directions."""
        return running_mean(self.x, self.window) if self.ordered else self.x

    @property
    def smoothed(self) -> Floats:
        """Return the values as drawn: [N]."""
        return running_mean(self.y, self.window)

    @property
    def smoothed_spread(self) -> Floats | None:
        """Return the band's half height as drawn: [N]."""
        return None if self.spread is None else running_mean(self.spread, self.window)

    @property
    def ending(self) -> str:
        """The last value in words."""
        if self.last is not None:
            return self.last
        known = self.y[np.isfinite(self.y)]
        return short(float(known[-1])) if len(known) else ""


def line_of(label: str, points: Curve, colour: int = 0, spread: Floats | None = None) -> LineSeries:
    """Return the line of a curve."""
    return LineSeries(label, points.x, points.y, colour, spread)


def render(chart: Chart) -> Markup:
    """Return the figure: `<figure>` with caption, legend, drawing and note."""
    drawing = element(
        "svg",
        element("title", _description(chart)),
        *draw_chart(chart),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="plot",
    )
    note = element("p", chart.note, class_="note") if chart.note else Markup("")
    caption = element("figcaption", chart.title)
    return element("figure", caption, _legend(chart), drawing, note, class_="chart")


def draw_chart(chart: Chart, hover: bool = True) -> list[Markup]:
    """Return the elements of the drawing; with `hover`, numbers show under a pointer."""
    axes = Axes(*_ranges(chart))
    marks = (mark for line in chart.lines for mark in draw_line(line, axes, hover))
    return [*_frame(chart, axes), *marks]


def sparkline(values: Floats) -> Markup:
    """Return a small drawing of [N] values without axes."""
    y = np.asarray(values, dtype=np.float64)
    x, y = thinned(np.arange(len(y), dtype=np.float64), y, most=80)
    low, high = _widened(*_extent([y]))
    tops = 17 - (y - low) / (high - low) * 14
    lines = polyline(2 + x / max(1.0, x[-1]) * 92, tops, class_="line s0")
    return element("svg", *lines, viewBox="0 0 96 20", class_="spark", aria_hidden="true")


@dataclass(frozen=True)
class Axes:
    """The ranges of both axes, and positions of their numbers in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def left(self, x: Floats) -> Floats:
        """Return horizontal positions [N] in the drawing."""
        low, high = self.x
        return LEFT + (np.asarray(x) - low) / (high - low) * (RIGHT - LEFT)

    def top(self, y: Floats) -> Floats:
        """Return vertical positions [N] in the drawing."""
        low, high = self.y
        return BOTTOM - (np.asarray(y) - low) / (high - low) * (BOTTOM - TOP)


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
    marks = []
    ticks = nice_ticks(*axes.y)
    for y, text in zip(axes.top(np.array(ticks)), tick_labels(ticks), strict=True):
        marks.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        marks.append(element("text", text, x=LEFT - 6, y=y + 4, class_="tick end"))
    ticks = nice_ticks(*axes.x, target=4)
    marks.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    for x, text in zip(axes.left(np.array(ticks)), tick_labels(ticks), strict=True):
        marks.append(element("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="axis"))
        anchor = "tick end" if x > RIGHT - 12 else "tick middle"
        marks.append(element("text", text, x=min(x, RIGHT), y=BOTTOM + 16, class_=anchor))
    centre = (LEFT + RIGHT) / 2
    marks.append(element("text", chart.x_label, x=centre, y=HEIGHT - 5, class_="label middle"))
    for value, text in chart.levels:
        y = float(axes.top(np.array(value)))
        marks.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="level"))
        marks.append(element("text", text, x=RIGHT, y=y - 4, class_="tick end"))
    for value, text in chart.marks_x:
        x = float(axes.left(np.array(value)))
        marks.append(element("line", x1=x, x2=x, y1=TOP, y2=BOTTOM, class_="level"))
        side, position = ("end", x - 4) if x > centre else ("start", x + 4)
        # Names of levels stand on the right above their lines: not on top of each other.
        named = [float(axes.top(np.array(level))) for level, name in chart.levels if name]
        taken = side == "end" and any(abs(top - 4 - (TOP + 8)) < 16 for top in named)
        y = BOTTOM - 6 if taken else TOP + 8
        marks.append(element("text", text, x=position, y=y, class_=f"tick {side}"))
    if chart.diagonal:
        ends = np.array([max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])])
        marks += polyline(axes.left(ends), axes.top(ends), class_="level")
    return marks


def _legend(chart: Chart) -> Markup:
    keys = chart.keys
    if keys is None:
        keys = [(line.label, line.colour, line.dash, line.ending) for line in chart.lines]
    items = []
    for label, colour, dash, ending in keys:
        swatch = element("i", class_=f"swatch {style(colour, dash)}")
        items.append(element("li", swatch, label, " ", element("b", ending)))
    return element("ul", *items, class_="legend")


def _description(chart: Chart) -> str:
    """Return the chart in words, for those who cannot see it."""
    ends = "; ".join(f"{line.label} ends at {line.ending}" for line in chart.lines)
    return f"{chart.title} over {chart.x_label}: {ends}"


def style(colour: int, dash: int) -> str:
    """Return the classes of a colour and a dash."""
    return f"s{colour} d{dash}" if dash else f"s{colour}"


def draw_line(line: LineSeries, axes: Axes, hover: bool = True) -> list[Markup]:
    """Return the marks of one line, those in the background first.

    Args:
        line: The line.
        axes: Positions of its numbers in the drawing.
        hover: Whether points show their numbers under a pointer.
    """
    if line.ordered:
        return _path(line, axes, hover)
    marks = []
    smooth, spread = line.smoothed, line.smoothed_spread
    colour = f"s{line.colour}"
    if line.band is not None:
        low, high = (axes.top(end) for end in line.band)
        marks += band(axes.left(line.x), low, high, class_=f"band {colour}")
    if spread is not None:
        x, low = thinned(line.x, smooth - spread)
        high = np.interp(x, line.x, smooth + spread)
        marks += band(axes.left(x), axes.top(low), axes.top(high), class_=f"band {colour}")
    elif line.window > 1:
        x, y = thinned(line.x, line.y)
        marks += polyline(axes.left(x), axes.top(y), class_=f"raw {colour}")
    if line.whiskers is not None:
        marks += _whiskers(line.x, line.whiskers, axes, f"whisker {colour}")
    x, y = thinned(line.x, smooth)
    marks += polyline(axes.left(x), axes.top(y), class_=f"line {style(line.colour, line.dash)}")
    if line.disc is not None:
        spot = slice(line.disc, line.disc + 1)
        marks += _dots(axes.left(line.x[spot]), axes.top(line.y[spot]), f"dot {colour}", 3.6)
    elif len(x) <= _MOST_DOTS:
        marks += _dots(axes.left(x), axes.top(y), f"dot {colour}", 2.2)
    return marks + (_hover(line, x, y, axes) if hover else [])


def _path(line: LineSeries, axes: Axes, hover: bool) -> list[Markup]:
    """Draw a path whose later part is darker, with a ring at its start and a disc at its end."""
    marks = []
    x, y = line.positions, line.smoothed
    parts = min(6, max(1, len(x) - 1))
    edges = np.linspace(0, len(x) - 1, parts + 1).round().astype(int)
    for part, (start, end) in enumerate(pairwise(edges)):
        age = round(5 * (part + 1) / parts)
        points = slice(start, end + 1)
        kind = f"line s{line.colour} age{age}"
        marks += polyline(axes.left(x[points]), axes.top(y[points]), class_=kind)
    left, top = axes.left(x), axes.top(y)
    marks += _dots(left[:1], top[:1], f"ring s{line.colour}", 4)
    marks += _dots(left[-1:], top[-1:], f"dot s{line.colour}", 4.5)
    names = [(0, "start", 4), (-1, "end", -9)]
    if line.disc is not None:
        published = slice(line.disc, line.disc + 1)
        marks += _dots(left[published], top[published], f"ring s{line.colour}", 6)
        if line.disc == len(x) - 1:
            names[1] = (-1, "end, published", -9)
        else:
            names.append((line.disc, "published", -9))
    for index, text, rise in names:
        beyond = left[index] > WIDTH - 60
        shift, anchor = (4, "end") if beyond else (8, "start")
        spot = {"x": float(left[index]) + shift, "y": float(top[index]) + rise}
        marks.append(element("text", text, class_=f"tick strong {anchor}", **spot))
    return marks + (_hover(line, x, y, axes) if hover else [])


def _whiskers(x: Floats, ends: tuple[Floats, Floats], axes: Axes, kind: str) -> list[Markup]:
    lefts, lows, highs = axes.left(x), axes.top(ends[0]), axes.top(ends[1])
    return [
        element("line", x1=float(left), x2=float(left), y1=float(a), y2=float(b), class_=kind)
        for left, a, b in zip(lefts, lows, highs, strict=True)
    ]


def _dots(xs: Floats, ys: Floats, kind: str, radius: float) -> list[Markup]:
    return [
        element("circle", cx=float(x), cy=float(y), r=radius, class_=kind)
        for x, y in zip(xs, ys, strict=True)
        if np.isfinite(y)
    ]


def _hover(line: LineSeries, x: Floats, y: Floats, axes: Axes) -> list[Markup]:
    """Return invisible points that show their numbers under a pointer."""
    index = np.unique(
        np.linspace(0, len(x) - 1, min(len(x), _MOST_HOVER_POINTS)).round().astype(int)
    )
    marks = []
    for point in index[np.isfinite(y[index])]:
        text = f"{line.label}, {line.unit} {short(float(x[point]))}: {short(float(y[point]))}"
        left, top = float(axes.left(x[point])), float(axes.top(y[point]))
        title = element("title", text)
        kind = f"hover s{line.colour}"
        marks.append(element("circle", title, cx=left, cy=top, r=5, class_=kind))
    return marks


@dataclass(frozen=True)
class Curve:
    """Points of one metric: `x` [N] steps, ascending, and `y` [N] values."""

    x: Floats
    y: Floats


def curve(rows: Iterable[Row], names: Sequence[str]) -> Curve | None:
    """Return the points of the first of `names` that any row has; `None` if none has it.

    A step logged twice counts with its last value.
    """
    rows = list(rows)
    for name in names:
        points = {
            float(row[STEP]): _finite_or_nan(row[name])
            for row in rows
            if STEP in row and name in row
        }
        if points and not all(np.isnan(value) for value in points.values()):
            steps = sorted(points)
            return Curve(np.array(steps), np.array([points[step] for step in steps]))
    return None


def joint(left: Curve, right: Curve) -> tuple[Floats, Floats, Floats]:
    """Return (steps [N], left y [N], right y [N]) at the steps that both have, gaps left out."""
    shared, in_left, in_right = np.intersect1d(left.x, right.x, return_indices=True)
    a, b = left.y[in_left], right.y[in_right]
    known = np.isfinite(a) & np.isfinite(b)
    return shared[known], a[known], b[known]


def window_of(count: int) -> int:
    """Return the width of the running mean for `count` points: 1 where they are few."""
    return 1 if count <= SMOOTH_ABOVE else 2 * (count // _WINDOWS_PER_CURVE // 2) + 1


def running_mean(y: Floats, window: int) -> Floats:
    """Return the mean over `window` points around each [N]; fewer at the ends; gaps left out."""
    if window <= 1:
        return y
    known = np.isfinite(y)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def thinned(x: Floats, y: Floats, most: int = _MOST_POINTS) -> tuple[Floats, Floats]:
    """Return at most `most` points, every bucket's lowest and highest: no spike is lost."""
    if len(x) <= most:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), max(1, most // 2 - 1)):
        known = bucket[np.isfinite(y[bucket])]
        if len(known):
            keep |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
        else:
            keep.add(int(bucket[0]))
    index = np.array(sorted(keep))
    return x[index], y[index]


def _finite_or_nan(value: object) -> float:
    """Return a finite number, or NaN for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return float("nan")
    number = float(value)
    return number if np.isfinite(number) else float("nan")


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """Return one element; strings are escaped, `Markup` children are taken as they are.

    Args:
        tag: name of the element; from this package's code, never from data.
        *children: the content of the element.
        **attributes: `class_` is written `class`, other underscores as hyphens. Numbers are cut to
            two decimals.
    """
    parts = [
        Markup(' {}="{}"').format(_attribute_name(name), _attribute_value(value))
        for name, value in attributes.items()
    ]
    inside = Markup("").join(
        child if isinstance(child, Markup) else escape(visible(child)) for child in children
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(parts), inside)


def group(children: Iterable[Markup], **attributes: Value) -> Markup:
    """Return a `g` element."""
    return element("g", *children, **attributes)


def polyline(xs: ArrayLike, ys: ArrayLike, **attributes: Value) -> list[Markup]:
    """Return a path for each unbroken stretch of points [N]; a lonely point becomes a dot."""
    parts = []
    for points in stretches(xs, ys):
        if len(points) == 1:
            (x, y), *_ = points
            dot = {**attributes, "class_": f"dot {attributes.get('class_', '')}".strip()}
            parts.append(element("circle", cx=x, cy=y, r=2.5, **dot))
        else:
            parts.append(element("path", d="M" + _points(points), **attributes))
    return parts


def band(xs: ArrayLike, low: ArrayLike, high: ArrayLike, **attributes: Value) -> list[Markup]:
    """Return the areas between two curves [N], broken where either has a gap."""
    bottom = np.asarray(low, dtype=np.float64)
    top = np.where(np.isfinite(bottom), np.asarray(high, dtype=np.float64), np.nan)
    bottom = np.where(np.isfinite(top), bottom, np.nan)
    parts = []
    for upper, lower in zip(stretches(xs, top), stretches(xs, bottom), strict=True):
        outline = [*upper, *reversed(lower)]
        parts.append(element("path", d="M" + _points(outline) + "Z", **attributes))
    return parts


def stretches(xs: ArrayLike, ys: ArrayLike) -> list[list[tuple[float, float]]]:
    """Split points [N] at gaps (NaN)."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(np.asarray(xs, float), np.asarray(ys, float), strict=True):
        if np.isfinite(x) and np.isfinite(y):
            parts[-1].append((float(x), float(y)))
        elif parts[-1]:
            parts.append([])
    return [points for points in parts if points]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _attribute_name(name: str) -> str:
    # SVG's attributes keep their capitals: `viewBox`, `preserveAspectRatio`.
    return name.rstrip("_").replace("_", "-")


def _attribute_value(value: Value) -> str:
    return visible(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return about `target` round values (1, 2 or 5 times a power of ten) within [low, high].

    Args:
        low: lower end, finite.
        high: upper end, finite and above `low`.
        target: number of steps aimed at.
    """
    assert low < high, (low, high)
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """Write ticks with the decimals that their spacing needs; thousands as `2k`."""
    if len(ticks) < 2:
        return [short(tick) for tick in ticks]
    step = ticks[1] - ticks[0]
    largest = max(abs(tick) for tick in ticks)
    if largest < 1e-3 or largest >= 1e6:
        return [short(tick) for tick in ticks]
    if largest >= 10_000:
        return [_signed(f"{tick / 1000:.{_decimals(step / 1000)}f}") + "k" for tick in ticks]
    return [_signed(f"{tick + 0.0:,.{_decimals(step)}f}") for tick in ticks]


def short(value: float) -> str:
    """Write a number with three significant digits: `0.0123`, `1.23`, `12,300`, `1.2e−05`."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e7:
        return _signed(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:,.{digits}f}"
    if value == int(value) and size >= 1:
        text = f"{int(value):,}"
    return _signed(text)


def count_label(value: int | None) -> str:
    """Write a large count: `1.31M`, `864k`, `512`; a dash for `None`."""
    if value is None:
        return DASH
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def duration(seconds: float | None) -> str:
    """Write a time in its two largest units: `3 h 07 min`, `2 min 05 s`, `8.3 s`."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
