"""Answers side by side, by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_exp.evaluation.quick import quick_comparison
from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.report.data import ReportData, Sample
from rlhf_exp.report.page import render_page
from rlhf_exp.report.samples import rule_of, samples_of

Compare = Callable[..., QuickResult]


def test_samples_are_the_picks(compare: Compare) -> None:
    result = compare()
    samples = samples_of([result])
    assert [sample.rule for sample in samples] == [pick.rule for pick in result.picks]
    first = result.rows[result.picks[0].row]
    assert samples[0].prompt == first.prompt
    assert samples[0].sides[0].text == first.answer_a
    assert dict(samples[0].sides[1].facts) == {
        "reward": f"{first.score_b:.2f}".replace("-", "\u2212"),
        "KL": "3.00",
        "outcome": "win",
    }
    assert rule_of([result]) == result.pick_rule


def against(name: str, gains: dict[int, float]) -> QuickResult:
    """Compare a model with the baseline on 40 prompts; 0 gain where nothing is said."""
    base = np.arange(40.0)
    scores = base + [gains.get(row, 0.0) for row in range(40)]
    prompts = [f"Question {row}" for row in range(40)]
    said = [[f"{who} to {row}" for row in range(40)] for who in ("SFT", name)]
    return quick_comparison(prompts, *said, base, scores, name_b=name)


def chosen(samples: list[Sample]) -> dict[int, str]:
    return {int(sample.prompt.removeprefix("Question ")): sample.rule for sample in samples}


def test_all_models_answer_each_prompt_that_any_comparison_picked() -> None:
    results = [
        against("PPO", {3: 5.0, 7: -2.0, 5: 1.0}),
        against("third", {7: 4.0, 9: -1.0, 5: 1.0}),
    ]
    samples = samples_of(results)
    rules = chosen(samples)
    assert rules[3].startswith("largest gain: PPO")
    assert rules[7] == "largest loss: PPO; largest gain: third"
    assert rules[5] == "largest gain: PPO, third"
    assert rules[9].startswith("largest loss: third")
    picked = {pick.row for result in results for pick in result.picks}
    assert len(samples) == len(rules) == len(picked)
    for row, sample in zip(rules, samples, strict=True):
        assert [side.name for side in sample.sides] == ["SFT", "PPO", "third"]
        expected = [f"{who} to {row}" for who in ("SFT", "PPO", "third")]
        assert [side.text for side in sample.sides] == expected
    by_name = {side.name: dict(side.facts) for side in samples[list(rules).index(7)].sides}
    assert by_name["SFT"]["reward"] == "7.00"
    assert (by_name["PPO"]["reward"], by_name["PPO"]["outcome"]) == ("5.00", "loss")
    assert (by_name["third"]["reward"], by_name["third"]["outcome"]) == ("11.00", "win")


def test_the_page_shows_them_and_says_the_rule() -> None:
    results = [against("PPO", {3: 5.0}), against("third", {9: 1.0})]
    plain: list[dict[str, Any]] = [result.to_json() for result in results]
    parts = {"comparisons.json": plain}
    page = render_page(ReportData("three", [], {}, evaluation=plain[0], parts=parts))
    samples = page.partition('id="samples"')[2]
    assert "the 3 largest gains in reward" in samples
    assert "This for each model against SFT: PPO, third." in samples
    assert "third to 3" in samples
    assert "PPO to 9" in samples
    alone = render_page(ReportData("two", [], {}, evaluation=plain[0]))
    assert "third to" not in alone
