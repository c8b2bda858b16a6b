"""`rlhf-exp judge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp import cli
from tests.judge_lab import decoder
from tests.judge_server import JudgeServer, longer
from tests.lab import jsonl

PAIR = {"prompt": "Which?", "answer_a": "good", "answer_b": "not why"}
LABELS = [
    {**PAIR, "annotator": "anna", "winner": "a"},
    {**PAIR, "annotator": "ben", "winner": "a"},
    {**PAIR, "prompt": "Then?", "annotator": "anna", "winner": "b"},
    {**PAIR, "prompt": "Then?", "annotator": "ben", "winner": "tie"},
]


def test_people_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "labels.jsonl", LABELS)
    assert cli.main(["judge", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Pairs 2; by majority 1 for a, 1 ties, 0 for b People 2 Two people agree 0.500" in shown


def test_the_question_is_named_and_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = [{**row, "criterion": "helpful"} for row in LABELS]
    votes.append({**PAIR, "annotator": "anna", "criterion": "harmless", "winner": "b"})
    command = ["judge", str(jsonl(tmp_path / "votes.jsonl", votes))]
    assert cli.main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    words = "Question helpful; the file also has harmless (--question chooses) Pairs 2;"
    assert words in shown
    out = tmp_path / "o.json"
    assert cli.main([*command, "--question", "harmless", "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Question harmless; the file also has helpful" in shown
    assert "Pairs 1; by majority 0 for a, 0 ties, 1 for b" in shown
    assert json.loads(out.read_text())["criterion"] == "harmless"
    assert cli.main([*command, "--question", "honest"]) == 2
    assert "it has votes on helpful, harmless" in capsys.readouterr().err


def test_a_classifier_and_an_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "labels.jsonl", LABELS)
    command = ["--outputs", str(tmp_path / "outputs"), "judge", str(file)]
    command += [
        "--reward",
        str(decoder(tmp_path / "classifier")),
        "--out",
        str(tmp_path / "o.json"),
    ]
    with JudgeServer(longer) as server:
        llm = ["--llm", "stand-in", "--url", server.url, "--request", "max_tokens:9"]
        assert cli.main([*command, *llm]) == 0
        assert {body["max_tokens"] for body in server.bodies} == {9}
        shown = capsys.readouterr().out
        assert "alike in both orders 2 of 2, first answer wins 50.0 %" in shown
        assert cli.main([*command, *llm, "--pairs", "1"]) == 0
        assert "0 replies asked for, 2 kept ones" in capsys.readouterr().out
        assert len(server.bodies) == 4
    found = json.loads((tmp_path / "o.json").read_text())
    # By the last word: why above good; by length: likewise. People: a.
    assert [one["confusion"] for one in found["judges"]] == [[[0, 0, 1], [0, 0, 0], [0, 0, 0]]] * 2
    assert [one["judge"] for one in found["judges"]] == ["classifier", "stand-in"]


def test_the_reward_model_of_a_run(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "labels.jsonl", LABELS)
    assert cli.main(["--outputs", str(small_run), "judge", str(file), "--reward", "small"]) == 0
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--llm", "x"], "--llm: needs --url"),
        (["--llm", "x", "--url", "http://a", "--key-env", "RLHF_EXP_NO_SUCH"], "no such env"),
        (["--pairs", "0"], "--pairs 0: must be at least 1"),
        (["--reward", "nowhere"], "nowhere"),
        (["--llm", "x", "--url", "http://a", "--concurrency", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    file = jsonl(tmp_path / "labels.jsonl", LABELS)
    assert cli.main(["--outputs", str(tmp_path / "o"), "judge", str(file), *options]) == 2
    assert says in capsys.readouterr().err
