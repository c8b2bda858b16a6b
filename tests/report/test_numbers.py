"""Ticks and number formats."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.report.numbers import count_label, duration, nice_ticks, short, tick_labels


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
