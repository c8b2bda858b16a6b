"""The evaluation in words."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.evaluation.preference import Metric
from rlhf_exp.evaluation.statistics import Estimate
from rlhf_exp.report.run.verdict import (
    independent_verdicts,
    marked_rows,
    needed_label,
    outcome_bar,
    p_label,
    reward_as_judge,
    tiles_of,
    verdict_sentence,
)

Compare = Callable[..., ModelComparison]


CONFIG: dict[str, Any] = {
    "eval": {"models": ["sft", "ppo"], "judge": {"model": "other/reward"}},
    "reward": {"use": None},
    "ppo": {"use": None},
    "dpo": {"use": None},
}


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        # p = 0.054
        ((30, 54, 16), "The reward model names no clear winner: PPO 30, SFT 16."),
        ((30, 54, 10), "The reward model prefers PPO over SFT, 30 to 10."),
        ((10, 54, 30), "The reward model prefers SFT over PPO, 30 to 10."),
        ((0, 5, 0), "The reward model prefers neither SFT nor PPO: 5 ties."),
        ((30, 0, 0), "The reward model prefers PPO over SFT, 30 to 0."),
        (
            (29, 0, 0),
            "The reward model names no clear winner: PPO 29, SFT 0; 29 prompts are too few to "
            "name one.",
        ),
    ],
)
def test_no_winner_is_named_unless_the_test_says_so(
    compare: Compare, counts: tuple[int, int, int], sentence: str
) -> None:
    assert verdict_sentence(compare(*counts)) == sentence


@pytest.mark.parametrize(
    ("name", "changes", "judge"),
    [
        ("PPO", {}, "The reward that PPO was trained on"),
        ("PPO", {"ppo": {"use": "demo"}}, "The reward model"),
        ("ppo-other", {}, "The reward model"),  # a run or a folder of that name
        ("PPO", {"eval": {"models": ["sft", "dpo"]}}, "The reward model"),
    ],
)
def test_the_headline_says_whether_the_reward_is_what_was_maximised(
    compare: Compare, name: str, changes: dict[str, Any], judge: str
) -> None:
    assert reward_as_judge(CONFIG | changes, compare(name_b=name)) == judge


def test_dpo_saw_the_preferences_that_the_reward_model_learned_from(compare: Compare) -> None:
    config = CONFIG | {"eval": {"models": ["sft", "dpo"]}}
    result = compare(name_b="DPO")
    words = "A reward model of the preferences that DPO was trained on"
    assert reward_as_judge(config, result) == words
    given = config | {"reward": {"use": "other/model"}}
    assert reward_as_judge(given, result) == "The reward model, on which DPO was not trained,"
    served = replace(result, judge="reward server")
    assert reward_as_judge(config, served) == "The reward server, on which DPO was not trained,"


def judged(kind: str, judge: str, wins: int, losses: int, p_value: float) -> dict[str, Any]:
    preference = {"wins": wins, "ties": 0, "losses": losses, "p_value": p_value}
    return {"kind": kind, "judge": judge, "preference": preference}


def test_the_judges_that_nothing_was_trained_on(compare: Compare) -> None:
    comparison = {
        "a": "SFT",
        "b": "PPO",
        "judges": [
            judged("reward", "reward model", 90, 10, 1e-9),
            judged("model", "other/reward", 60, 40, 0.057),
            judged("llm", "gpt", 30, 70, 1e-4),
        ],
    }
    votes = {"criterion": "helpful", "p_value": 1e-3, "wins": 40, "ties": 4, "losses": 9}
    parts = {
        "judges.json": {"comparisons": [comparison, comparison | {"b": "DPO"}]},
        "people.json": {"studies": [{"names": ["SFT", "PPO"], "criteria": [votes]}]},
    }
    result = compare()
    assert independent_verdicts(CONFIG, result, parts) == [
        "other/reward names no clear winner: PPO 60, SFT 40.",
        "gpt prefers SFT over PPO, 70 to 30.",
        "People prefer PPO over SFT, 40 to 9 (helpful).",
    ]
    assert independent_verdicts(CONFIG, result, {}) == []
    # The reward model itself, named as the judge, is no independent one.
    same = CONFIG | {"reward": {"use": "other/reward"}}
    same["eval"] = CONFIG["eval"] | {"judge": {"model": "other/reward"}}
    assert len(independent_verdicts(same, result, parts)) == 2
    # Nor is a term of the sum that was maximised.
    for term in ({"model": "other/reward"}, {"models": ["other/reward", "org/second"]}):
        summed = CONFIG | {"ppo": {"use": None, "reward": {"terms": [{"weight": 1.0} | term]}}}
        assert len(independent_verdicts(summed, result, parts)) == 2


def test_the_rule_based_judge_is_independent(compare: Compare) -> None:
    better = Metric(
        "gold",
        "Gold judge, 0 to 1",
        "higher",
        Estimate(0.5, 0.45, 0.55),
        Estimate(0.6, 0.55, 0.65),
        Estimate(0.1, 0.05, 0.15),
    )
    words = "The data's rule-based judge, on which nothing was trained: PPO 0.60, SFT 0.50"
    result = compare()
    result = replace(result, metrics=(*result.metrics, better))
    assert independent_verdicts(CONFIG, result, {}) == [f"{words} (higher)."]
    few = replace(compare(5, 0, 5), metrics=result.metrics)
    assert independent_verdicts(CONFIG, few, {}) == [f"{words} (no clear difference)."]


def test_few_prompts_mark_nothing(compare: Compare) -> None:
    verdicts = [row.verdict for row in marked_rows(compare(30, 0, 0))]
    assert "better" in verdicts
    few = [row.verdict for row in marked_rows(compare(29, 0, 0))]
    assert set(few) == {"unclear", ""}
    assert len(few) == len(verdicts)


def test_the_tiles_hold_the_published_numbers(compare: Compare) -> None:
    rate, gain, kl = tiles_of(compare())
    assert rate.label == "PPO wins, of decided"
    assert rate.value.replace("\xa0", " ") == "65.2 %"
    assert rate.detail.replace("\xa0", " ") == "49.8 % to 78.6 %; p = 0.054"
    # Gain: (2 * 30 - 2 * 16) / 100 = 0.28; std of 50 times -1 and 50 times 1: sqrt(100 / 99).
    assert gain.value == "+0.279"
    assert (kl.value, kl.detail) == ("3.00", "3.00 to 3.00; nats")


def test_the_tile_of_an_undecided_comparison(compare: Compare) -> None:
    assert tiles_of(compare(0, 4, 0))[0].detail == "nothing decided"


def test_the_study_that_would_be_needed(compare: Compare) -> None:
    # 88 decided prompts at 46 decided of 100: 88 * 100 / 46 = 191.3.
    words = needed_label(compare().preference).replace("\xa0", " ")
    assert words == "80 % power at this win rate takes 88 decided prompts, about 192 in all"
    assert needed_label(compare(0, 4, 0).preference) == ""
    assert "more than 20,000" in needed_label(compare(5, 0, 5).preference)


def test_the_bar_is_in_proportion(compare: Compare) -> None:
    bar = ET.fromstring(outcome_bar(compare()))
    assert [(r.attrib["class"], float(r.attrib["x"])) for r in bar.iter("rect")] == [
        ("win", 0.0),
        ("tie", 300.0),
        ("loss", 840.0),
    ]
    last = list(bar.iter("rect"))[-1]
    assert float(last.attrib["x"]) + float(last.attrib["width"]) == 1000.0
    assert "30 wins, 54 ties, 16 losses of PPO" in "".join(bar.itertext())
    only = ET.fromstring(outcome_bar(compare(3, 0, 0)))
    assert [r.attrib["width"] for r in only.iter("rect")] == ["1000"]


def test_p_values_are_readable() -> None:
    assert p_label(0.05407) == "p\xa0=\xa00.054"
    assert p_label(2.1e-14) == "p\xa0=\xa02e\u221214"
    assert p_label(0.0004) == "p\xa0=\xa04e\u22124"
