"""The judges' section.

People's votes on a run, in its report.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.annotation.campaign import Campaign, CampaignInfo, Choice, Vote, item_of
from rlhf_exp.annotation.results import campaign_summaries
from rlhf_exp.evaluation.judges.human_agreement import (
    Judgment,
    against_people,
    compare_judges,
    judge_quality,
    people_agreement,
)
from rlhf_exp.evaluation.judges.llm import TokenUsage
from rlhf_exp.evaluation.judges.protocol import Verdict
from rlhf_exp.report.run import preference
from rlhf_exp.report.run.gather import gather
from rlhf_exp.report.run.preference import render_judges
from tests.report.run.test_gather import artifact

NAME = "<script>alert(1)</script>\u202e"


@pytest.fixture
def plain() -> dict[str, Any]:
    """The published study's outcome by one judge, and an LLM that mostly goes by the order."""
    reward = [Verdict(s, probability=0.9) for s in [1] * 30 + [0] * 54 + [-1] * 16]
    llm = [Verdict(1, orders=(1, 1))] * 10 + [Verdict(0, orders=(-1, 1))] * 80
    llm += [Verdict(0), Verdict(0, orders=(None, 1), unparsed=True)] * 5
    judgments = [
        Judgment.of("reward", "reward model", reward),
        Judgment.of("llm", NAME, llm, usage=TokenUsage(170, 10, 3, 12_345, 678, 5)),
    ]
    ratings = [[1, 1], [-1, -1], [0, 1], [-1, -1]]
    comparison = {
        "a": "SFT",
        "b": NAME,
        "judges": [one.to_json() for one in judgments],
        "agreement": compare_judges(judgments),
    }
    people = people_agreement(ratings, ["x", "y"])
    judged = {"kind": "llm", **judge_quality(NAME, [1, -1, 1, 1], ratings).to_json()}
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
    text = re.sub(r"<[^>]+>", " ", str(render_judges(plain)))
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
    page = str(render_judges(plain))
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


NBSP = "\N{NO-BREAK SPACE}"


def new_campaign(outputs: Path, wins: int, ties: int, losses: int, **changes: Any) -> Campaign:
    """Return a campaign on `eval/evalkey` whose one annotator prefers b, neither and a so often."""
    items = [item_of(f"prompt {n}", "a", "b") for n in range(wins + ties + losses)]
    values = {
        "source": "eval/evalkey",
        "name_a": "SFT",
        "name_b": "PPO",
        "collect": False,
        "criteria": ("overall",),
        "instructions": "",
    }
    campaign = Campaign.create(
        outputs / "human" / f"{changes.get('source', 'demo').replace('/', '-')}.sqlite",
        CampaignInfo(**{**values, **changes}),
        items,
    )
    campaign.invite(["anna"])
    # On side 0 answer A is model a's.
    choices = [Choice.B] * wins + [Choice.tie] * ties + [Choice.A] * losses
    for item, choice in zip(items, choices, strict=True):
        campaign.record(Vote(item.id, "anna", "overall", 0, choice, 5.0, "2026-01-01", 0))
    return campaign


def section(outputs: Path) -> dict[str, Any]:
    """Return what the report says of people, as JSON would carry it."""
    evaluation = artifact(
        outputs, "eval", {"people.json": {"names": ["SFT", "PPO"], "prompts": 100, "differ": 97}}
    )
    found = gather("demo", {"eval": evaluation}).parts["people.json"]
    plain: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return plain


def test_the_published_study(tmp_path: Path) -> None:
    """30 better, 54 ties, 16 worse: p 0.054, 0.49751 to 0.78646, 0.570 with ties as half."""
    new_campaign(tmp_path, 30, 54, 16)
    plain = section(tmp_path)
    told = dict(plain["studies"][0]["criteria"][0]["preference"])
    assert told["Exact sign test"] == "p = 0.0541, ties left out"
    assert told["Win rate among decided"] == "0.652 (95 % 0.498 to 0.786, Clopper-Pearson)"
    assert told["Ties as half"].startswith("0.570 ")
    page = " ".join(preference.render_people(plain).split())
    for words in ("<b>30</b> wins", "<b>54</b> ties", "<b>16</b> losses", "0.498 to 0.786"):
        assert words in page
    assert "judged by 1 person" in page
    assert "30 wins, 54 ties, 16 losses of PPO" in page


def test_each_question_has_its_outcome_and_one_table_has_all(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, 27, 0, 3, criteria=("overall", "harmless", "helpful"))
    campaign.invite(["never came"])
    for vote in campaign.votes()[:4]:
        campaign.record(Vote(**asdict(vote) | {"criterion": "harmless", "revision": 0}))
    plain = section(tmp_path)
    page = preference.render_people(plain)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    # 27 of 30: p = 8e-6; four are too few to name a winner.
    overall, harmless, helpful = text.split("Which answer is ")[1:]
    assert overall.startswith("better overall? People prefer PPO over SFT")
    assert "judged by 1 person" in overall  # the other one was invited only
    assert harmless.startswith("more harmless? People name no clear winner")
    assert helpful.startswith("more helpful? No votes yet.")
    assert page.count("<svg") == 2
    head, *rows = page.partition("<tbody>")[0].split("<thead>")
    assert re.findall(r'col">(\w+)', rows[0]) == ["Votes", "overall", "harmless", "helpful"]
    (net,) = re.findall(r"<bdi>Net</bdi></th>(.*?)</tr>", page, re.S)
    assert re.findall(r'label="(\w+)"><span>(\S+)', net)[0] == ("overall", "+80.0")
    assert re.findall(r'label="(\w+)"><span>([^<]+)', net)[2] == ("helpful", "\N{EN DASH}")
    assert "<h3" in head


def test_what_stands_beside_a_value() -> None:
    values = ["0.58 (95 % 0.4 to 0.7, exact)", "p = 0.2, ties left out", "72 % of 9", "0.5", "-"]
    ((_, cells),) = preference.rows_of([[("x", value)] for value in values])
    assert cells == [
        ("0.58", "(95 % 0.4 to 0.7, exact)"),
        ("p = 0.2,", "ties left out"),
        ("72 %", "of 9"),
        ("0.5", ""),
        ("-", ""),
    ]


def test_two_campaigns_are_told_apart(tmp_path: Path) -> None:
    new_campaign(tmp_path, 1, 0, 0)
    plain = section(tmp_path)
    assert "study <bdi>" not in preference.render_people(plain)
    first = next((tmp_path / "human").glob("*.sqlite"))
    (tmp_path / "human" / "<b>second.sqlite").write_bytes(first.read_bytes())
    both = campaign_summaries(tmp_path / "human", "eval/evalkey")
    page = preference.render_people({**plain, "studies": both})
    assert "study <bdi>&lt;b&gt;second</bdi>" in page


def test_no_names_of_annotators(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, 2, 1, 1)
    campaign.invite(["ben"])
    for vote in campaign.votes("anna"):
        campaign.record(Vote(**asdict(vote) | {"annotator": "ben", "revision": 0}))
    plain = section(tmp_path)
    text = json.dumps(plain)
    assert "anna" not in text
    assert "annotator 1 and annotator 2" in text
    assert (
        dict(plain["studies"][0]["criteria"][0]["quality"])["Agreement of two annotators"]
        == "100.0 %"
    )


def test_campaigns_of_other_answers_are_left_out(tmp_path: Path) -> None:
    new_campaign(tmp_path, 1, 0, 0, source="eval/other")
    new_campaign(tmp_path, 1, 0, 0, source="eval/evalkey2", collect=True)
    (tmp_path / "human" / "broken.sqlite").write_text("no database")
    assert section(tmp_path)["studies"] == []


def test_without_votes_the_page_says_how_to_get_some(tmp_path: Path) -> None:
    page = preference.render_people({**section(tmp_path), "needed": [[0.65, 93]]})
    assert "Nobody has judged these answers yet. 97 of 100 prompts" in page
    assert "93 decided prompts if 65 % of them are won." in page
    assert "rlhf-exp annotate evalkey --annotators 3" in page


def test_an_evaluation_without_the_part_shows_a_campaign_that_there_is(tmp_path: Path) -> None:
    evaluation = artifact(tmp_path, "eval", {})
    assert gather("demo", {"eval": evaluation}).parts == {}
    new_campaign(tmp_path, 1, 0, 0)
    plain = gather("demo", {"eval": evaluation}).parts["people.json"]
    assert "<b>1</b> wins" in preference.render_people(plain)
