"""From metric rows to points.

Ticks and number formats.

Charts as SVG: well-formed, numbers in the right places, hostile text as text.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rlhf_exp.report import chart as chart_module
from rlhf_exp.report.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axes,
    Chart,
    Curve,
    LineSeries,
    count_label,
    curve,
    duration,
    joint,
    nice_ticks,
    render,
    running_mean,
    short,
    sparkline,
    thinned,
    tick_labels,
    window_of,
)


def test_curve_takes_the_first_name_logged_and_the_last_value_of_a_step() -> None:
    rows = [
        {"global_step": 3, "b": 3.0},
        {"global_step": 1, "b": 9.0, "other": 1.0},
        {"global_step": 1, "b": 1.0},
        {"global_step": 2, "other": 5.0},
        {"b": 7.0},
    ]
    points = curve(rows, ["a", "b"])
    assert points is not None
    assert list(points.x) == [1.0, 3.0]
    assert list(points.y) == [1.0, 3.0]
    assert curve(rows, ["a"]) is None
    assert curve([], ["a"]) is None


def test_what_is_no_finite_number_is_a_gap() -> None:
    rows = [
        {"global_step": step, "a": value}
        for step, value in enumerate([1.0, math.nan, math.inf, None, "<b>", True, 2.0])
    ]
    points = curve(rows, ["a"])  # type: ignore[arg-type]
    assert points is not None
    assert list(np.isfinite(points.y)) == [True, False, False, False, False, False, True]
    assert curve([{"global_step": 1, "a": math.nan}], ["a"]) is None


def test_joint_points_are_those_of_both() -> None:
    left = Curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0, 30.0, math.nan]))
    right = Curve(np.array([2.0, 3.0, 4.0, 5.0]), np.array([0.2, math.nan, 0.4, 0.5]))
    steps, a, b = joint(left, right)
    assert (list(steps), list(a), list(b)) == ([2.0], [20.0], [0.2])


def test_running_mean_by_hand_with_a_gap() -> None:
    found = running_mean(np.array([1.0, 2.0, 6.0, math.nan, 8.0]), 3)
    # (1+2)/2, (1+2+6)/3, (2+6)/2, gap, 8/1
    assert list(found[:3]) == [1.5, 3.0, 4.0]
    assert math.isnan(found[3])
    assert found[4] == 8.0
    assert window_of(60) == 1
    assert window_of(250) == 11  # odd, so that it is centred


def test_thinning_keeps_ends_and_spikes() -> None:
    x = np.arange(100_000, dtype=float)
    y = np.zeros(100_000)
    y[[777, 50_001]] = [5.0, -7.0]
    y[60_000:70_000] = math.nan
    few_x, few_y = thinned(x, y, most=100)
    assert len(few_x) <= 100
    assert (few_x[0], few_x[-1]) == (0.0, 99_999.0)
    assert np.nanmax(few_y) == 5.0
    assert np.nanmin(few_y) == -7.0
    assert np.isnan(few_y).any()  # the gap stays a gap
    assert thinned(x[:100], y[:100], most=100)[0] == pytest.approx(x[:100])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 2.2, [0.0, 0.5, 1.0, 1.5, 2.0]),
        (3.0, 640.0, [200.0, 400.0, 600.0]),
        (-1e-5, 4e-5, [-1e-5, 0.0, 1e-5, 2e-5, 3e-5, 4e-5]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("low", "high"), [(1e9, 1e9 + 1), (-7e-8, -6.9e-8), (0, 1e300), (-5, 7)])
def test_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    margin = (high - low) * 1e-6
    assert 2 <= len(ticks) <= 11
    assert all(low - margin <= tick <= high + margin for tick in ticks)


def test_tick_labels_have_the_decimals_of_their_spacing() -> None:
    assert tick_labels([-0.5, 0.0, 0.5]) == ["\u22120.5", "0.0", "0.5"]
    assert tick_labels([0.0, 200.0, 400.0]) == ["0", "200", "400"]
    assert tick_labels([0.0, 5000.0, 10000.0]) == ["0k", "5k", "10k"]
    assert tick_labels([0.0, 2500.0, 10000.0])[1] == "2k"
    assert tick_labels([1e-5, 2e-5]) == ["1e\u221205", "2e\u221205"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.2345, "1.23"),
        (-0.01234, "\u22120.0123"),
        (123.456, "123"),
        (12345.0, "12,345"),
        (2.0, "2"),
        (1.2e-5, "1.2e\u221205"),
        (3.1e9, "3.1e+09"),
        (math.nan, "not finite"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_counts_and_times() -> None:
    assert [count_label(n) for n in (None, 512, 427_520, 1_314_816, 6_900_000_000)] == [
        "–",
        "512",
        "428k",
        "1.31M",
        "6.9B",
    ]
    assert [duration(s) for s in (None, 8.27, 59.7, 125, 3600 * 3 + 7 * 60)] == [
        "–",
        "8.3 s",
        "59.7 s",
        "2 min 05 s",
        "3 h 07 min",
    ]


def parse(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def texts(figure: ET.Element) -> list[str]:
    return ["".join(element.itertext()) for element in figure.iter("text")]


def paths(figure: ET.Element, kind: str) -> list[str]:
    return [p.attrib["d"] for p in figure.iter("path") if kind in p.attrib["class"].split()]


def test_element_escapes_children_and_attributes() -> None:
    found = chart_module.element("text", "<b>&\u202e", class_='"x" on="y\ud800', x=1.23456, y=2.0)
    assert found == (
        '<text class="&#34;x&#34; on=&#34;y⟨U+D800⟩" x="1.23" y="2">&lt;b&gt;&amp;⟨U+202E⟩</text>'
    )


def test_axes_map_corners_to_corners() -> None:
    axes = Axes((0.0, 10.0), (-1.0, 1.0))
    assert list(axes.left(np.array([0.0, 5.0, 10.0]))) == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    assert list(axes.top(np.array([-1.0, 1.0]))) == [BOTTOM, TOP]  # up is up


def test_a_line_goes_from_left_to_right_and_up() -> None:
    line = LineSeries("loss", np.array([0.0, 50.0, 100.0]), np.array([0.0, 1.0, 2.0]))
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
    line = LineSeries("a", np.arange(7.0), y)
    figure = parse(render(Chart("t", [line])))
    assert len(paths(figure, "line")) == 2
    assert "nan" not in render(Chart("t", [line])).lower()


def test_the_band_surrounds_the_mean() -> None:
    line = LineSeries("r", np.arange(3.0), np.zeros(3), spread=np.full(3, 2.0))
    figure = parse(render(Chart("t", [line])))
    (area,) = paths(figure, "band")
    heights = {float(pair.split()[1]) for pair in area[1:-1].split("L")}
    (path,) = paths(figure, "line")
    middle = float(path[1:].split("L")[0].split()[1])
    assert min(heights) < middle < max(heights)
    assert sum(heights) / 2 == pytest.approx(middle, abs=0.1)


def test_many_points_are_smoothed_and_still_shown() -> None:
    noise = np.random.default_rng(0).normal(size=500)
    figure = parse(render(Chart("t", [LineSeries("a", np.arange(500.0), noise)])))
    assert len(paths(figure, "raw")) == 1
    assert len(paths(figure, "line")) == 1


def test_a_path_marks_its_start_and_end_and_is_not_sorted() -> None:
    line = LineSeries("p", np.array([1.0, 3.0, 2.0]), np.array([0.0, 1.0, 2.0]), ordered=True)
    figure = parse(render(Chart("t", [line], x_label="KL")))
    assert {"start", "end"} <= set(texts(figure))
    drawn = [float(pair.split()[0]) for p in paths(figure, "line") for pair in p[1:].split("L")]
    assert max(drawn) not in (drawn[0], drawn[-1])


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0, 5.0], [1e-12, 1e-12], [1e300, -1e300], [0.0, 1e-300]]
)
def test_degenerate_values_still_draw(values: list[float]) -> None:
    line = LineSeries("a", np.arange(float(len(values))), np.array(values))
    markup = render(Chart("t", [line], levels=[(0.0, "")]))
    assert parse(markup).find("svg") is not None
    assert "nan" not in markup
    assert "inf" not in markup
    parse(sparkline(np.array(values)))


def test_hostile_names_are_text_and_nothing_has_a_style_attribute() -> None:
    bad = "<script>alert(1)</script>\u202e"
    line = LineSeries(bad, np.arange(3.0), np.arange(3.0))
    chart = Chart(bad, [line], x_label=bad, note=bad, levels=[(1.0, bad)])
    figure = parse(render(chart))
    assert not list(figure.iter("script"))
    assert "<script>alert(1)</script>⟨U+202E⟩" in texts(figure)
    assert all("style" not in element.attrib for element in figure.iter())
