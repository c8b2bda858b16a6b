"""People's votes on a run, in its report."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_exp.human.items import item_of
from rlhf_exp.human.standing import standings
from rlhf_exp.human.study import About, Study
from rlhf_exp.human.votes import Choice, Vote
from rlhf_exp.report.gather import gather
from rlhf_exp.report.parts import people
from tests.report.test_gather import artifact

NBSP = "\N{NO-BREAK SPACE}"


def study(outputs: Path, wins: int, ties: int, losses: int, **changes: Any) -> Study:
    """Return a study of `eval/evalkey` whose one annotator prefers b, neither and a so often."""
    items = [item_of(f"prompt {n}", "a", "b") for n in range(wins + ties + losses)]
    values = {
        "source": "eval/evalkey",
        "name_a": "SFT",
        "name_b": "PPO",
        "collect": False,
        "criteria": ("overall",),
        "instructions": "",
    }
    made = Study.create(
        outputs / "human" / f"{changes.get('source', 'demo').replace('/', '-')}.sqlite",
        About(**{**values, **changes}),
        items,
    )
    made.invite(["anna"])
    # On side 0 answer A is model a's.
    choices = [Choice.B] * wins + [Choice.tie] * ties + [Choice.A] * losses
    for item, choice in zip(items, choices, strict=True):
        made.record(Vote(item.id, "anna", "overall", 0, choice, 5.0, "2026-01-01", 0))
    return made


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
    study(tmp_path, 30, 54, 16)
    plain = section(tmp_path)
    told = dict(plain["studies"][0]["criteria"][0]["preference"])
    assert told["Exact sign test"] == "p = 0.0541, ties left out"
    assert told["Win rate among decided"] == "0.652 (95 % 0.498 to 0.786, Clopper-Pearson)"
    assert told["Ties as half"].startswith("0.570 ")
    page = " ".join(people.render(plain).split())
    for words in ("<b>30</b> wins", "<b>54</b> ties", "<b>16</b> losses", "0.498 to 0.786"):
        assert words in page
    assert "judged by 1 person" in page
    assert "30 wins, 54 ties, 16 losses of PPO" in page


def test_each_question_has_its_outcome_and_one_table_has_all(tmp_path: Path) -> None:
    made = study(tmp_path, 9, 0, 1, criteria=("overall", "harmless", "helpful"))
    made.invite(["never came"])
    for vote in made.votes()[:4]:
        made.record(Vote(**asdict(vote) | {"criterion": "harmless", "revision": 0}))
    plain = section(tmp_path)
    page = people.render(plain)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    # Nine of ten: p = 2 * 11 / 1024 = 0.021; four of four, or three: p of 1/8 and more.
    overall, harmless, helpful = text.split("Which answer is ")[1:]
    assert overall.startswith("better overall? PPO is preferred over SFT.")
    assert "judged by 1 person" in overall  # the other one was invited only
    assert harmless.startswith("more harmless? No clear winner between SFT and PPO.")
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
    ((_, cells),) = people.rows_of([[("x", value)] for value in values])
    assert cells == [
        ("0.58", "(95 % 0.4 to 0.7, exact)"),
        ("p = 0.2,", "ties left out"),
        ("72 %", "of 9"),
        ("0.5", ""),
        ("-", ""),
    ]


def test_two_studies_are_told_apart(tmp_path: Path) -> None:
    study(tmp_path, 1, 0, 0)
    plain = section(tmp_path)
    assert "study <bdi>" not in people.render(plain)
    first = next((tmp_path / "human").glob("*.sqlite"))
    (tmp_path / "human" / "<b>second.sqlite").write_bytes(first.read_bytes())
    both = standings(tmp_path / "human", "eval/evalkey")
    page = people.render({**plain, "studies": both})
    assert "study <bdi>&lt;b&gt;second</bdi>" in page


def test_no_names_of_annotators(tmp_path: Path) -> None:
    made = study(tmp_path, 2, 1, 1)
    made.invite(["ben"])
    for vote in made.votes("anna"):
        made.record(Vote(**asdict(vote) | {"annotator": "ben", "revision": 0}))
    plain = section(tmp_path)
    text = json.dumps(plain)
    assert "anna" not in text
    assert "annotator 1 and annotator 2" in text
    assert (
        dict(plain["studies"][0]["criteria"][0]["quality"])["Agreement of two annotators"]
        == "100.0 %"
    )


def test_studies_of_other_answers_are_left_out(tmp_path: Path) -> None:
    study(tmp_path, 1, 0, 0, source="eval/other")
    study(tmp_path, 1, 0, 0, source="eval/evalkey2", collect=True)
    (tmp_path / "human" / "broken.sqlite").write_text("no database")
    assert section(tmp_path)["studies"] == []


def test_without_votes_the_page_says_how_to_get_some(tmp_path: Path) -> None:
    page = people.render({**section(tmp_path), "needed": [[0.65, 93]]})
    assert "Nobody has judged these answers yet. 97 of 100 prompts" in page
    assert "93 decided prompts if 65 % of them are won." in page
    assert "rlhf-exp annotate evalkey --annotators 3" in page


def test_an_evaluation_without_the_part_shows_a_study_that_there_is(tmp_path: Path) -> None:
    evaluation = artifact(tmp_path, "eval", {})
    assert gather("demo", {"eval": evaluation}).parts == {}
    study(tmp_path, 1, 0, 0)
    plain = gather("demo", {"eval": evaluation}).parts["people.json"]
    assert "<b>1</b> wins" in people.render(plain)
