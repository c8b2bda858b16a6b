"""Schedules by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.training.optim import Schedule, lr_multiplier


def test_warmup_rises_to_one_and_constant_stays() -> None:
    values = [lr_multiplier("constant", step, 8, 4) for step in range(8)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_no_warmup_begins_at_the_peak() -> None:
    schedules: list[Schedule] = ["constant", "linear", "cosine"]
    assert [lr_multiplier(schedule, 0, 10, 0) for schedule in schedules] == [1.0, 1.0, 1.0]


def test_linear_falls_to_the_floor() -> None:
    values = [lr_multiplier("linear", step, 6, 2, floor=0.2) for step in range(8)]
    # Warm-up 1/2, 1; then quarters of the way from 1 to 0.2, and the floor once 6 steps are done.
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_half_a_period() -> None:
    values = [lr_multiplier("cosine", step, 3, 0) for step in range(4)]
    # (1 + cos(60 degrees)) / 2 = 0.75, (1 + cos(120 degrees)) / 2 = 0.25.
    assert values == pytest.approx([1.0, 0.75, 0.25, 0.0], abs=1e-12)
    assert lr_multiplier("cosine", 1, 4, 0, floor=0.1) == pytest.approx(
        0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    )


def test_unknown_schedule_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'cosin'.*constant, linear, cosine"):
        lr_multiplier("cosin", 0, 1, 0)  # type: ignore[arg-type]
