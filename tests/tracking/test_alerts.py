"""Rules over rows, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.tracking.alerts import AlertMonitor, AlertRules
from rlhf_exp.tracking.create import open_tracker

KL, REWARD, ENTROPY = (
    "KL is far above its target",
    "Reward has collapsed",
    "Entropy has collapsed",
)


def row(kl: float = 1.0, mean: float = 0.0, std: float = 1.0, entropy: float = 2.0) -> dict:
    return {"kl/sequence": kl, "reward/mean": mean, "reward/std": std, "policy/entropy": entropy}


def raised(monitor: AlertMonitor, *rows: dict) -> list[list[str]]:
    return [[title for title, _ in monitor.check(one)] for one in rows]


def test_kl_above_its_limit() -> None:
    monitor = AlertMonitor(AlertRules(kl=18.0))
    assert raised(monitor, row(kl=18.0), row(kl=18.1)) == [[], [KL]]


def test_an_alert_rests_for_twenty_rows() -> None:
    seen = raised(AlertMonitor(AlertRules(kl=1.0)), *[row(kl=2.0)] * 45)
    assert [number for number, titles in enumerate(seen) if titles] == [0, 21, 42]


def test_reward_below_its_best() -> None:
    monitor = AlertMonitor(AlertRules(reward_drop=1.0))
    rows = [row(mean=mean, std=0.5) for mean in (1, 1, 1, 1, 1, 0, 0, 0, 0)]
    # Means of five: 1, 0.8, 0.6, 0.4, 0.2. Below 1 - 0.5 the last two, of which one rests.
    assert raised(monitor, *rows) == [[]] * 7 + [[REWARD], []]


def test_a_single_bad_iteration_is_no_collapse() -> None:
    rows = [row(mean=mean, std=0.5) for mean in (1, 1, 1, 1, 1, -1, 1, 1)]
    assert raised(AlertMonitor(AlertRules(reward_drop=1.0)), *rows) == [[]] * 8  # at worst 0.6


def test_entropy_below_a_fraction_of_the_first() -> None:
    monitor = AlertMonitor(AlertRules(entropy=0.25))
    assert raised(monitor, row(entropy=2.0), row(entropy=0.5), row(entropy=0.49)) == [
        [],
        [],
        [ENTROPY],
    ]


def test_rules_that_are_off_and_rows_of_other_stages() -> None:
    wild = row(kl=1e9, mean=-1e9, entropy=0.0)
    assert raised(AlertMonitor(), *[row()] * 5, *[wild] * 5) == [[]] * 10
    assert AlertMonitor(AlertRules(kl=1.0)).check({"loss/total": 3.0}) == []


def test_what_an_engine_does_not_know_raises_nothing() -> None:
    rules = AlertRules(kl=1.0, reward_drop=1.0, entropy=0.5)
    rows = [{"reward/mean": mean, "reward/std": 1.0} for mean in [0.0] * 5 + [-3.0] * 5]
    # The mean over five falls by 0.6 a row: by 1.2, more than one deviation, with the second.
    assert raised(AlertMonitor(rules), *rows) == [*[[]] * 6, [REWARD], *[[]] * 3]
    means = [{"reward/mean": one["reward/mean"]} for one in rows]
    assert raised(AlertMonitor(rules), *means) == [[]] * 10


def test_alerts_are_kept_with_the_run_and_forgotten_with_their_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = AlertRules(entropy=0.5)

    def alerts() -> list[tuple[int, str]]:
        lines = (tmp_path / "alerts.jsonl").read_text().splitlines()
        return [(one["global_step"], one["title"]) for one in map(json.loads, lines)]

    tracker = open_tracker("disabled", tmp_path, alerts=rules)
    for step, entropy in ((1, 2.0), (2, 1.5), (3, 0.9)):
        tracker.log(row(entropy=entropy), step)
    tracker.finish()
    assert alerts() == [(3, ENTROPY)]
    assert "alert at step 3: Entropy has collapsed" in caplog.text
    resumed = open_tracker("disabled", tmp_path, alerts=rules, resume_step=2)
    assert alerts() == []
    resumed.log(row(entropy=0.9), 3)  # the first entropy, 2, is remembered
    resumed.finish()
    assert alerts() == [(3, ENTROPY)]
