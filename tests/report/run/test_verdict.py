"""The evaluation in words."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.report.run.verdict import (
    needed_label,
    outcome_bar,
    p_label,
    tiles_of,
    verdict_sentence,
)

Compare = Callable[..., ModelComparison]


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((30, 54, 16), "No clear winner between SFT and PPO."),  # p = 0.054
        ((30, 54, 10), "PPO is preferred over SFT."),
        ((10, 54, 30), "SFT is preferred over PPO."),
        ((0, 5, 0), "SFT and PPO tie on all 5 prompts."),
    ],
)
def test_no_winner_is_named_unless_the_test_says_so(
    compare: Compare, counts: tuple[int, int, int], sentence: str
) -> None:
    assert verdict_sentence(compare(*counts)) == sentence


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
