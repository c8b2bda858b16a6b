"""Means and intervals over seeds, beside scipy's.

Which hyperparameters vary, and which runs are replicates.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.report.sweep.charts import explained_variance, levels_of
from rlhf_exp.report.sweep.data import (
    RunPoint,
    SettingsSource,
    difference,
    group_runs,
    intervals,
    rank_groups,
    summarise_seeds,
    varied_settings,
)
from rlhf_exp.report.sweep.settings import flatten, override_values


def point(key: str, objective: float | None, status: str = "done", **settings: str) -> RunPoint:
    return RunPoint("kl", key, status, (), settings, "0", objective, {})


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.3, 1.2, 0.7, 2.4, 1.9, 0.2]
    found = summarise_seeds(values)
    assert found is not None
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.estimate.mean == pytest.approx(sum(values) / 6)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((theirs.low, theirs.high))


def test_fewer_than_three_seeds_have_no_interval() -> None:
    found = summarise_seeds([1.0, 3.0, None, math.nan])
    assert found is not None
    assert (found.values, found.estimate.mean, found.has_interval) == ((1.0, 3.0), 2.0, False)
    assert found.to_json()["low"] is None
    assert summarise_seeds([None]) is None
    # Of 1, 2 and 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = 2.6458, error 2.6458 / sqrt(3) =
    # 1.5275; Student's t of two degrees of freedom is 4.3027 (any table), so 3 +- 6.5724.
    three = summarise_seeds([1.0, 2.0, 6.0])
    assert three is not None
    assert (three.estimate.low, three.estimate.high) == pytest.approx((-3.5724, 9.5724), abs=1e-3)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_95_percent_intervals_hold_the_truth_in_95_of_100_sweeps(seeds: int) -> None:
    sweeps = np.random.default_rng(seeds).normal(2.0, 0.7, size=(2, 20_000, seeds))
    _, low, high = intervals(sweeps[0].T)
    # 20,000 sweeps: the share has a standard error of 0.15 %.
    assert ((low < 2.0) & (high > 2.0)).mean() == pytest.approx(0.95, abs=0.008)
    pairs = [
        difference(first, second)
        for a, b in zip(*sweeps[:, :4000], strict=True)
        if (first := summarise_seeds(a)) and (second := summarise_seeds(3 * b))
    ]
    # Three times the spread: Welch's is a little too careful with three seeds, never too narrow.
    held = np.mean([pair.low < 4.0 < pair.high for pair in pairs])
    assert 0.942 < held < 0.975


def test_bands_are_the_intervals_at_each_step() -> None:
    values = np.array([[0.0, 1.0, np.nan], [1.0, 2.0, 5.0], [5.0, 9.0, 7.0], [2.0, np.nan, np.nan]])
    mean, low, high = intervals(values)
    assert mean.tolist() == [2.0, 4.0, 6.0]
    for step, count in ((0, 4), (1, 3)):
        theirs = stats.ttest_1samp(values[:count, step], 0.0).confidence_interval(0.95)
        assert (low[step], high[step]) == pytest.approx((theirs.low, theirs.high))
    assert np.isnan([low[2], high[2]]).all()


def test_the_difference_of_two_settings_is_welchs() -> None:
    a, b = summarise_seeds([1.0, 2.0, 4.0, 3.5, 0.5]), summarise_seeds([2.0, 5.0, 6.0, 4.5])
    assert a is not None
    assert b is not None
    found = difference(a, b)
    theirs = stats.ttest_ind(b.values, a.values, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx(4.375 - 2.2)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    two, equal = summarise_seeds([1.0, 2.0]), summarise_seeds([1.0, 1.0, 1.0])
    assert two is not None
    assert equal is not None
    assert not math.isfinite(difference(a, two).low)
    assert difference(equal, equal).high == 0.0


def test_groups_are_in_the_order_of_numbers() -> None:
    points = [point(lr, 1.0, lr=lr) for lr in ("0.001", "1e-05", "2", "0.001")]
    assert [one.settings["lr"] for one in group_runs(points)] == ["1e-05", "0.001", "2"]
    assert len(group_runs(points)[1].points) == 2


def test_the_best_is_that_of_the_mean_and_not_of_a_lucky_survivor() -> None:
    points = [
        *(point(f"a{n}", value, lr="1") for n, value in enumerate((1.0, 2.0, 3.0))),
        *(point(f"b{n}", value, lr="2") for n, value in enumerate((0.0, 0.0, 5.0))),
        point("c0", 9.0, lr="3"),
        point("c1", None, "failed", lr="3"),
        point("c2", None, "failed", lr="3"),
    ]
    ranked = rank_groups(group_runs(points))
    assert [group.settings["lr"] for group, _ in ranked] == ["1", "2"]
    # A pruned run's last value is no result.
    assert rank_groups(group_runs([point("p", 3.0, "pruned", lr="1")])) == []


def test_levels() -> None:
    points = [point(str(n), None, lr=str(10.0**-n)) for n in range(8)]
    found = levels_of(points, "lr", 4)
    assert found.labels == (
        "1e−07 to 1e−06",
        "1e−05 to 0.000100",
        "0.00100 to 0.0100",
        "0.100 to 1",
    )
    assert found.numbers == (3, 3, 2, 2, 1, 1, 0, 0)
    words = [point(str(n), None, model=name) for n, name in enumerate("aabbcd")]
    assert levels_of(words, "model", 3).labels == ("a", "b", "other")
    assert levels_of(words, "model", 3).numbers == (0, 0, 1, 1, 2, 2)


def test_the_explained_share_is_that_of_the_analysis_of_variance() -> None:
    numbers, values = [0, 0, 1, 1], [1.0, 3.0, 6.0, 10.0]
    # By hand: mean 5; between 2 (2 - 5)^2 + 2 (8 - 5)^2 = 36; total 16 + 4 + 1 + 25 = 46.
    assert explained_variance(numbers, values) == pytest.approx(36 / 46)
    assert explained_variance([*numbers, 1], [*values, math.nan]) == pytest.approx(36 / 46)
    assert explained_variance([0, 1], [2.0, 2.0]) == 0.0


def origin(config: dict[str, object] | None, *overrides: str) -> SettingsSource:
    return SettingsSource(overrides, None if config is None else flatten(config))


def test_a_command_line_and_a_config_write_one_number_alike() -> None:
    assert override_values(["ppo.lr=1e-4", "+ppo.x=[1,2]", "a=null", "b=True", "~c"]) == {
        "ppo.lr": "0.0001",
        "ppo.x": "[1, 2]",
        "a": "null",
        "b": "true",
    }
    made = origin({"ppo": {"lr": 0.0001, "epochs": 4}}, "ppo.lr=1e-4")
    failed = origin(None, "ppo.lr=1e-4")
    assert varied_settings([made, failed]).varied == ()


def test_what_a_failed_run_does_not_say_is_the_default_of_those_that_do_not_say_it() -> None:
    said = origin({"ppo": {"lr": 0.0001, "epochs": 8}}, "ppo.lr=1e-4", "ppo.epochs=8")
    silent = origin({"ppo": {"lr": 0.001, "epochs": 4}}, "ppo.lr=1e-3")
    failed = origin(None, "ppo.lr=1e-2")
    found = varied_settings([said, silent, failed])
    assert found.varied == ("ppo.lr", "ppo.epochs")
    assert found.settings[2] == {"ppo.lr": "0.01", "ppo.epochs": "4"}


def test_seeds_are_no_settings_and_where_runs_are_kept_is_none() -> None:
    runs = [
        origin({"seed": n, "ppo": {"seed": n, "lr": 1.0}, "name": f"n{n}"}, f"seed={n}", "name=x")
        for n in range(2)
    ]
    found = varied_settings(runs)
    assert found.varied == ()
    assert found.seeds == ("0", "1")


def test_several_seeds_are_named() -> None:
    runs = [origin({"sft": {"seed": a}, "ppo": {"seed": b}}) for a, b in ((0, 0), (0, 1), (1, 1))]
    assert varied_settings(runs).seeds == ("0", "ppo 1, sft 0", "1")


def test_a_group_choice_is_one_column_however_much_it_changes() -> None:
    runs = [
        origin({"model": {"name": name, "width": width}}, f"model={name}")
        for name, width in (("small", 1), ("large", 2))
    ]
    assert varied_settings(runs).varied == ("model",)
    # Where command lines do not tell runs apart, configs do.
    without = [origin({"model": {"name": name}}) for name in ("small", "large")]
    assert varied_settings(without).settings == ({"model.name": "small"}, {"model.name": "large"})
