"""The judges' section."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rlhf_exp.evaluation.judges.judge import Verdict
from rlhf_exp.evaluation.judges.judgments import Judgment, against_people, compare_judges
from rlhf_exp.evaluation.judges.llm import Usage
from rlhf_exp.evaluation.judges.quality import people_of, quality
from rlhf_exp.report.parts.judges import render

NAME = "<script>alert(1)</script>\u202e"


@pytest.fixture
def plain() -> dict[str, Any]:
    """The published study's outcome by one judge, and an LLM that mostly goes by the order."""
    reward = [Verdict(s, probability=0.9) for s in [1] * 30 + [0] * 54 + [-1] * 16]
    llm = [Verdict(1, orders=(1, 1))] * 10 + [Verdict(0, orders=(-1, 1))] * 80
    llm += [Verdict(0), Verdict(0, orders=(None, 1), unparsed=True)] * 5
    judgments = [
        Judgment.of("reward", "reward model", reward),
        Judgment.of("llm", NAME, llm, usage=Usage(170, 10, 3, 12_345, 678, 5)),
    ]
    ratings = [[1, 1], [-1, -1], [0, 1], [-1, -1]]
    comparison = {
        "a": "SFT",
        "b": NAME,
        "judges": [one.to_json() for one in judgments],
        "agreement": compare_judges(judgments),
    }
    people = people_of(ratings, ["x", "y"])
    judged = {"kind": "llm", **quality(NAME, [1, -1, 1, 1], ratings).to_json()}
    found = {
        "comparisons": [comparison],
        "quality": {
            "file": NAME,
            "unusable": 2,
            "people": people.to_json(),
            "judges": [judged],
        },
    }
    content: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return content


def words(plain: dict[str, Any]) -> str:
    text = re.sub(r"<[^>]+>", " ", str(render(plain)))
    return " ".join(text.replace("\xa0", " ").split())


def test_the_published_numbers_are_shown(plain: dict[str, Any]) -> None:
    shown = words(plain)
    assert "reward model 30, 54, 16 65.2 % [49.8, 78.6] 57.0 %" in shown
    assert "p = 0.054 88 (192)" in shown
    # First place: once in each of 10 pairs, twice in 80, and in the one readable order of 5.
    assert "10 of 90 pairs judged alike in both orders" in shown
    assert re.search(r"the answer shown first won 94\.6 % \[\S+ \S+ of 185 decided replies", shown)
    assert "12,345 tokens read and 678 written in 170 replies asked for and 10 kept ones" in shown
    assert "5 pairs without a readable verdict" in shown


def test_people_are_the_ceiling(plain: dict[str, Any]) -> None:
    shown = words(plain)
    # Majorities: b, a, tie, a; the judge: b, a, b, b. Two people agree on 3 of 4 pairs.
    assert "by majority 2 for a, 1 ties, 1 for b. 2 rows of the file are no pair" in shown
    assert "50.0 %" in shown
    assert re.search(r"two people – – – \S+ \[\S+ \S+ 75\.0 %", shown)
    assert "The last line is the ceiling" in shown
    assert "a 1 0 1 tie 0 0 1 b 0 0 1" in shown
    del plain["quality"]["people"]["agreement"], plain["quality"]["people"]["alpha"]
    plain["quality"]["people"] |= {"agreement": None, "alpha": None, "annotators": ["x"]}
    assert "One person judged each pair" in words(plain)
    plain["quality"] = None
    assert "Judges and people" not in words(plain)


def test_names_are_text(plain: dict[str, Any]) -> None:
    page = str(render(plain))
    assert "<script" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page


def test_people_who_judged_the_run_itself(plain: dict[str, Any]) -> None:
    ratings = [[1.0]] * 46 + [[float("nan")]] * 54
    reward, llm = against_people(plain["comparisons"][0], ratings)
    # Among the first 46: the reward judge 30 b and 16 ties; the LLM 10 b and 36 ties.
    assert (reward.pairs, reward.confusion[2]) == (46, (0, 16, 30))
    assert llm.confusion[2] == (0, 36, 10)
    assert reward.agreement.mean == pytest.approx(30 / 46)
