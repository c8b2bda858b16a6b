"""What a line chart is made of, and where its numbers lie in the drawing.

The drawing is laid out for a width of about 340 CSS pixels, the width of a phone and of a third of
a laptop's screen, so that its text keeps its size on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_exp.report.curves import Curve, Floats, running_mean, window_of
from rlhf_exp.report.numbers import short

WIDTH, HEIGHT = 340, 212
LEFT, RIGHT, TOP, BOTTOM = 44, WIDTH - 12, 10, HEIGHT - 36


@dataclass(frozen=True)
class Line:
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
        unit: of x, for what a pointer shows.
        last: text of the legend's value; the last y by default.
        dash: number of the dash class, 0 to 3; 0 leaves it to the colour.
        band: (low [N], high [N]) of an interval drawn as an area, or `None`.
        disc: index of the one point that is marked; by default all are where they are few.
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


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        title: what is shown, with its unit.
        lines: at least one.
        x_label: of the horizontal axis.
        note: one sentence below the drawing.
        include: y values that the axis must reach.
        levels: (value, label) of horizontal reference lines.
        diagonal: draw the line y = x.
        marks_x: (value, label) of vertical reference lines.
        keys: (label, colour, dash, value) of the legend, where it is not one entry a line.
        y_range: of the vertical axis, for charts that are to be compared; by default what it holds.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "optimizer step"
    note: str = ""
    include: Sequence[float] = field(default_factory=tuple)
    levels: Sequence[tuple[float, str]] = field(default_factory=tuple)
    diagonal: bool = False
    marks_x: Sequence[tuple[float, str]] = field(default_factory=tuple)
    keys: Sequence[tuple[str, int, int, str]] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axes:
    """The ranges of both axes and where they lie in the drawing."""

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


def line_of(label: str, points: Curve, colour: int = 0, spread: Floats | None = None) -> Line:
    """Return the line of a curve."""
    return Line(label, points.x, points.y, colour, spread)
