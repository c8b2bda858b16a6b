"""Votes go out and come back with the same winners, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_exp.annotation.campaign import Campaign, Choice, Vote, display_side, item_of, writing
from rlhf_exp.annotation.export import read_votes, write_preferences, write_votes
from rlhf_exp.annotation.ground_truth import read_ground_truth, template, write_ground_truth
from rlhf_exp.annotation.label_studio import interface, read_label_studio, write_label_studio
from rlhf_exp.data.layouts import parse_row
from rlhf_exp.data.rows import Preference
from rlhf_exp.errors import UserError
from tests.annotation.lab import new_campaign
from tests.lab import jsonl

CRITERIA = ("overall", "harmless")
Winners = dict[tuple[str, str, str], tuple[str, int]]


@pytest.fixture
def judged(tmp_path: Path) -> Campaign:
    """12 items, two criteria, three annotators; anna has seen everything, the others half of it."""
    campaign = new_campaign(tmp_path, count=12, criteria=CRITERIA, names=("anna", "ben", "carla"))
    generator = np.random.default_rng(0)
    votes = []
    for name in ("anna", "ben", "carla"):
        for item in campaign.items[: 12 if name == "anna" else 6]:
            for criterion in CRITERIA:
                choice = list(Choice)[generator.integers(3)]
                side = display_side(0, item.id, name)
                votes.append(Vote(item.id, name, criterion, side, choice, 2.5, "2026-01-02"))
    campaign.add(votes)
    return campaign


def winners(found: Campaign) -> Winners:
    return {
        (vote.item, vote.annotator, vote.criterion): (vote.winner, vote.side)
        for vote in found.votes()
    }


def without_votes(found: Campaign) -> None:
    with writing(found.path) as db:
        db.execute("DELETE FROM votes")


def test_json_lines(judged: Campaign, tmp_path: Path) -> None:
    before, path = winners(judged), tmp_path / "votes.jsonl"
    assert write_votes(judged, path) == 48  # (12 + 6 + 6) * 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        # The text that won, whatever was shown where.
        if row["winner"] != "tie":
            assert row[f"answer_{row['winner']}"].startswith(
                {"a": "first", "b": "second"}[row["winner"]]
            )
        assert (row["a"], row["b"]) == ("SFT", "PPO")
    without_votes(judged)
    assert judged.add(read_votes(judged, path)) == 48
    assert winners(judged) == before
    assert {vote.seconds for vote in judged.votes()} == {2.5}
    # Another campaign of the same answers reads them too: items are pinned by their texts.
    (tmp_path / "other").mkdir()
    other = new_campaign(tmp_path / "other", count=12, criteria=CRITERIA, names=())
    other.add(read_votes(other, path))
    assert winners(other) == before


def test_json_lines_of_another_campaign(judged: Campaign, tmp_path: Path) -> None:
    good = {"item": judged.items[0].id, "annotator": "anna", "winner": "b"}
    for changed, reason in (
        ({"item": "0" * 24}, "is not in study.sqlite"),
        ({"winner": "SFT"}, "winner 'SFT'; expected a, tie or b"),
        ({"criterion": "funny"}, "criterion 'funny'; the study has overall, harmless"),
        ({"annotator": " "}, "no usable name"),
        ({"first": "c"}, "substring not found"),
    ):
        path = jsonl(tmp_path / "bad.jsonl", [good, good | changed])
        with pytest.raises(UserError, match=f"bad.jsonl:2: .*{reason}"):
            read_votes(judged, path)
    with pytest.raises(UserError, match=r"bad.jsonl:1: .*KeyError: 'item'"):
        read_votes(judged, jsonl(tmp_path / "bad.jsonl", [{"winner": "a"}]))


def test_label_studio(judged: Campaign, tmp_path: Path) -> None:
    before = winners(judged)
    write_label_studio(judged, tmp_path / "ls")
    annotated = json.loads((tmp_path / "ls" / "annotations.json").read_text())
    texts = {item.id: (item.answer_a, item.answer_b) for item in judged.items}
    # By hand from the file: who chose which text.
    chosen: dict[tuple[str, str], set[str]] = {}
    for task in annotated:
        for one in task["annotations"]:
            for part in one["result"]:
                (label,) = part["value"]["choices"]
                text = {"A": task["data"]["answer_a"], "B": task["data"]["answer_b"]}.get(label)
                key = (one["completed_by"]["email"], part["from_name"])
                chosen.setdefault(key, set()).add(text or "tie of " + task["data"]["answer_a"][-2:])
    for (item, name, criterion), (winner, _) in before.items():
        if winner != "tie":
            assert texts[item]["ab".index(winner)] in chosen[name, criterion]
    without_votes(judged)
    assert judged.add(read_label_studio(judged, tmp_path / "ls" / "annotations.json")) == 48
    assert winners(judged) == before


def test_label_studio_tasks_show_one_side_and_tell_nothing(
    judged: Campaign, tmp_path: Path
) -> None:
    write_label_studio(judged, tmp_path)
    text = (tmp_path / "tasks.json").read_text()
    tasks = json.loads(text)
    assert len(tasks) == 12
    assert not any(secret in text for secret in ("SFT", "PPO", judged.info.source))
    assert not any(item.id in text for item in judged.items)
    first = [task["data"]["answer_a"].startswith("first") for task in tasks]
    assert 0 < sum(first) < 12
    assert tasks[0]["data"]["conversation"][0]["author"] == "Person"
    tree = ElementTree.fromstring(interface(CRITERIA))
    assert [one.get("name") for one in tree.iter("Choices")] == list(CRITERIA)
    choices = [one.get("value") for one in tree.find("Choices") or ()]
    assert choices == ["A", "Tie", "B"]
    shown = {one.get("value") for one in tree.iter() if one.get("value", "")[:1] == "$"}
    assert shown == {f"${name}" for name in tasks[0]["data"]} - {"$pair_id"}


def exported(judged: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Return two tasks as Label Studio exports them: its ids, its dates, cancelled ones too."""
    write_label_studio(judged, folder)
    tasks = json.loads((folder / "tasks.json").read_text())[:2]
    for number, (task, who) in enumerate(zip(tasks, (7, {"id": 8, "email": ""}), strict=True)):
        done = {
            "id": 1000 + number,
            "completed_by": who,
            "was_cancelled": False,
            "lead_time": 4.288,
            "updated_at": "2021-03-09T22:16:08.728378Z",
            "result": [
                {
                    "id": "x",
                    "from_name": "overall",
                    "to_name": "answer_a",
                    "type": "choices",
                    "origin": "manual",
                    "value": {"choices": ["Answer B"]},
                }
            ],
        }
        cancelled = json.loads(json.dumps(done | {"was_cancelled": True, "completed_by": 9}))
        task |= {"id": number, "annotations": [done, cancelled]}
    return tasks


def test_label_studios_own_exports(judged: Campaign, tmp_path: Path) -> None:
    tasks = exported(judged, tmp_path)
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    votes = read_label_studio(judged, path)
    assert [vote.annotator for vote in votes] == ["label-studio-7", "label-studio-8"]
    assert [(vote.choice, vote.seconds) for vote in votes] == [(Choice.B, 4.288)] * 2
    texts = {item.id: (item.answer_a, item.answer_b) for item in judged.items}
    won = [texts[vote.item]["ab".index(vote.winner)] for vote in votes]
    assert won == [task["data"]["answer_b"] for task in tasks]
    # JSON_MIN: one row an annotation, data and choices side by side.
    flat = [task["data"] | {"overall": "B", "annotator": 7, "lead_time": 1} for task in tasks]
    path.write_text(json.dumps(flat))
    assert [vote.sign for vote in read_label_studio(judged, path)] == [vote.sign for vote in votes]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ('{"a": 1}', "expected a list of tasks"),
        (
            '[{"data": {"pair_id": "x"}, "annotations": [{"completed_by": 1, "result": '
            '[{"type": "choices", "from_name": "overall", "value": {"choices": ["A"]}}]}]}]',
            "task 1: .*pair_id 'x' is not of the study",
        ),
        ('[{"pair_id": "x", "overall": "A"}]', "without an annotator"),
        ("[3]", "task 1"),
    ],
)
def test_what_is_no_label_studio_export(
    judged: Campaign, tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "export.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_label_studio(judged, path)


def test_ground_truth(judged: Campaign, tmp_path: Path) -> None:
    before = winners(judged)
    written = write_ground_truth(judged, tmp_path / "gt")
    assert sorted(path.name for path in written) == [
        "manifest.jsonl",
        "output.manifest",
        "template-harmless.liquid.html",
        "template-overall.liquid.html",
    ]
    without_votes(judged)
    assert judged.add(read_ground_truth(judged, tmp_path / "gt" / "output.manifest")) == 48
    assert winners(judged) == before


def test_ground_truths_own_output(judged: Campaign, tmp_path: Path) -> None:
    write_ground_truth(judged, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert not any(name in str(lines) for name in ("SFT", "PPO"))
    answers = [
        {
            "workerId": f"private.eu-west-1.{worker}",
            "annotationData": {"content": json.dumps({"overall": {"label": label}})},
        }
        for worker, label in (("A1", "A"), ("B2", "Tie"))
    ]
    output = lines[0] | {
        "my-job": {"annotationsFromAllWorkers": answers},
        "my-job-metadata": {"type": "groundtruth/custom", "human-annotated": "yes"},
    }
    votes = read_ground_truth(judged, jsonl(tmp_path / "output.manifest", [output, lines[1]]))
    assert [vote.annotator for vote in votes] == ["private.eu-west-1.A1", "private.eu-west-1.B2"]
    item = next(item for item in judged.items if item.id == votes[0].item)
    assert (item.answer_a, item.answer_b)["ab".index(votes[0].winner)] == lines[0]["answer_a"]
    assert votes[1].winner == "tie"
    with pytest.raises(UserError, match=r"output.manifest:1: no votes of this study: KeyError"):
        read_ground_truth(
            judged,
            jsonl(tmp_path / "output.manifest", [{"x": {"annotationsFromAllWorkers": answers}}]),
        )


def test_ground_truths_template_escapes(judged: Campaign) -> None:
    text = template(judged, "overall")
    assert "skip_autoescape" not in text
    assert text.count("{{") == 3
    for name in ("source", "answer_a", "answer_b"):
        assert f"{{{{ task.input.{name} }}}}" in text
    assert 'categories="[&quot;A&quot;, &quot;Tie&quot;, &quot;B&quot;]"' in text


def test_a_pair_too_long_for_a_manifest(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, own=[item_of("Hello?", "x" * 99_990, "short")])
    with pytest.raises(UserError, match=r"100,\d+ bytes.*at most 100,000.*begins 'Prompt: Hello"):
        write_ground_truth(campaign, tmp_path / "gt")
    assert not (tmp_path / "gt").exists()


def test_preferences_are_what_a_majority_chose(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=4, names=("anna", "ben", "carla"), collect=True)
    one, two, three, _ = campaign.items
    said = {
        one.id: ("A", "A", "B"),  # model a's answer twice of three
        two.id: ("B", "Tie", "B"),
        three.id: ("A", "B", "Tie"),  # no majority
    }
    for item, choices in said.items():
        for name, choice in zip(("anna", "ben", "carla"), choices, strict=True):
            campaign.record(Vote(item, name, "overall", 0, Choice(choice), None, "", 0))
    told = write_preferences(campaign, tmp_path / "votes.jsonl", "overall")
    assert (told.preferences, told.ties, told.open) == (2, 1, 1)
    lines = (tmp_path / "votes.jsonl").read_text().splitlines()
    rows = [parse_row(json.loads(line), "test") for line in lines]
    assert all(isinstance(row, Preference) for row in rows)
    assert {(row.chosen, row.rejected) for row in rows if isinstance(row, Preference)} == {
        (one.answer_a, one.answer_b),
        (two.answer_b, two.answer_a),
    }
    counts = [(row["votes_for"], row["votes"]) for row in map(json.loads, lines)]
    assert counts == [(2, 3), (2, 3)]


def test_evaluation_prompts_are_not_trained_on(judged: Campaign, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its prompts are those of the evaluation"):
        write_preferences(judged, tmp_path / "votes.jsonl", "overall")
    (tmp_path / "new").mkdir()
    empty = new_campaign(tmp_path / "new", collect=True)
    with pytest.raises(UserError, match="no item has a majority"):
        write_preferences(empty, tmp_path / "votes.jsonl", "overall")
