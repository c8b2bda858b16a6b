"""From metric rows to points."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_exp.report.curves import Curve, curve, joint, running_mean, thinned, window_of


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
