"""Charts as SVG: well-formed, numbers in the right places, hostile text as text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rlhf_exp.report import svg
from rlhf_exp.report.chart import BOTTOM, LEFT, RIGHT, TOP, Axes, Chart, Line
from rlhf_exp.report.plot import render, sparkline


def parse(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def texts(figure: ET.Element) -> list[str]:
    return ["".join(element.itertext()) for element in figure.iter("text")]


def paths(figure: ET.Element, kind: str) -> list[str]:
    return [p.attrib["d"] for p in figure.iter("path") if kind in p.attrib["class"].split()]


def test_element_escapes_children_and_attributes() -> None:
    found = svg.element("text", "<b>&\u202e", class_='"x" on="y\ud800', x=1.23456, y=2.0)
    assert found == (
        '<text class="&#34;x&#34; on=&#34;y⟨U+D800⟩" x="1.23" y="2">&lt;b&gt;&amp;⟨U+202E⟩</text>'
    )


def test_axes_map_corners_to_corners() -> None:
    axes = Axes((0.0, 10.0), (-1.0, 1.0))
    assert list(axes.left(np.array([0.0, 5.0, 10.0]))) == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert list(axes.top(np.array([-1.0, 1.0]))) == [BOTTOM, TOP]  # up is up


def test_a_line_goes_from_left_to_right_and_up() -> None:
    line = Line("loss", np.array([0.0, 50.0, 100.0]), np.array([0.0, 1.0, 2.0]))
    figure = parse(render(Chart("Title", [line])))
    (path,) = paths(figure, "line")
    points = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    # y from -0.1 to 2.1 (5 % margin) over 166 units: 0 lies 0.1 / 2.2 above the bottom.
    height = BOTTOM - TOP
    assert points[0] == pytest.approx((LEFT, BOTTOM - height * 0.1 / 2.2), abs=0.06)
    assert points[1] == pytest.approx(((LEFT + RIGHT) / 2, (BOTTOM + TOP) / 2), abs=0.06)
    assert points[2] == pytest.approx((RIGHT, TOP + height * 0.1 / 2.2), abs=0.06)
    assert {"0.0", "0.5", "1.0", "1.5", "2.0", "optimizer step", "100"} <= set(texts(figure))
    assert "loss 2" in "".join(figure.itertext())  # the legend has the last value


def test_gaps_break_the_line_and_a_lonely_point_is_a_dot() -> None:
    y = np.array([1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0])
    line = Line("a", np.arange(7.0), y)
    figure = parse(render(Chart("t", [line])))
    assert len(paths(figure, "line")) == 2
    assert "nan" not in render(Chart("t", [line])).lower()


def test_the_band_surrounds_the_mean() -> None:
    line = Line("r", np.arange(3.0), np.zeros(3), spread=np.full(3, 2.0))
    figure = parse(render(Chart("t", [line])))
    (area,) = paths(figure, "band")
    heights = {float(pair.split()[1]) for pair in area[1:-1].split("L")}
    (path,) = paths(figure, "line")
    middle = float(path[1:].split("L")[0].split()[1])
    assert min(heights) < middle < max(heights)
    assert sum(heights) / 2 == pytest.approx(middle, abs=0.1)


def test_many_points_are_smoothed_and_still_shown() -> None:
    noise = np.random.default_rng(0).normal(size=500)
    figure = parse(render(Chart("t", [Line("a", np.arange(500.0), noise)])))
    assert len(paths(figure, "raw")) == 1
    assert len(paths(figure, "line")) == 1


def test_a_path_marks_its_start_and_end_and_is_not_sorted() -> None:
    line = Line("p", np.array([1.0, 3.0, 2.0]), np.array([0.0, 1.0, 2.0]), ordered=True)
    figure = parse(render(Chart("t", [line], x_label="KL")))
    assert {"start", "end"} <= set(texts(figure))
    drawn = [float(pair.split()[0]) for p in paths(figure, "line") for pair in p[1:].split("L")]
    assert max(drawn) not in (drawn[0], drawn[-1])


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0, 5.0], [1e-12, 1e-12], [1e300, -1e300], [0.0, 1e-300]]
)
def test_degenerate_values_still_draw(values: list[float]) -> None:
    line = Line("a", np.arange(float(len(values))), np.array(values))
    markup = render(Chart("t", [line], levels=[(0.0, "")]))
    assert parse(markup).find("svg") is not None
    assert "nan" not in markup
    assert "inf" not in markup
    parse(sparkline(np.array(values)))


def test_hostile_names_are_text_and_nothing_has_a_style_attribute() -> None:
    bad = "<script>alert(1)</script>\u202e"
    line = Line(bad, np.arange(3.0), np.arange(3.0))
    chart = Chart(bad, [line], x_label=bad, note=bad, levels=[(1.0, bad)])
    figure = parse(render(chart))
    assert not list(figure.iter("script"))
    assert "<script>alert(1)</script>⟨U+202E⟩" in texts(figure)
    assert all("style" not in element.attrib for element in figure.iter())
