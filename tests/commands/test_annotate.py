"""`rlhf-exp annotate` on a small run: studies, exchange, the server, and the loop of feedback."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.annotation.campaign import Campaign, Choice, Vote, choice_of, display_side
from rlhf_exp.cli import main
from rlhf_exp.commands.annotate import annotate, sampled_pairs
from rlhf_exp.stages.data_module import DataModule
from rlhf_exp.store.run_records import Records, RunRecord
from rlhf_exp.training.reward_scorer import texts_of
from tests.annotation.serving import Served
from tests.lab import artifact, jsonl, launch, put_file, small_config


@pytest.fixture
def run_copy(run_copy: Path) -> Path:
    """The small run, its two models' answers made different where so little training left none."""
    found = artifact(run_copy, "eval")
    result = json.loads((found.path / "result.json").read_text())
    for number, row in enumerate(result["rows"]):
        row["answer_b"] += f" And {number}."
    put_file(found, "result.json", json.dumps(result).encode())
    return run_copy


def run_annotate(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    capsys.readouterr()
    code = main(["--outputs", str(outputs), "annotate", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def create_campaign(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    """Make a study, or go on with one, without serving it."""
    return run_annotate(
        capsys, outputs, *arguments, "--export", "labelstudio", str(outputs / "tasks")
    )


def refusal(capsys: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--outputs", str(outputs), "annotate", *arguments]) == 2
    return capsys.readouterr().err


def vote_on(campaign: Campaign, winner: str, names: tuple[str, ...] = ("anna",)) -> None:
    """Let everybody prefer the same model on every item."""
    campaign.add(
        [
            Vote(item.id, name, "overall", side, choice_of(winner, side), None, "")
            for item in campaign.items
            for name in names
            for side in [display_side(campaign.info.seed, item.id, name)]
        ]
    )


def test_a_runs_answers_are_judged(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, run_copy, "small", "--results")
    assert "no such study; start one with `rlhf-exp annotate RUN`" in error
    create_campaign(capsys, run_copy, "small", "--annotators", "anna,ben")
    text = run_annotate(capsys, run_copy, "small", "--results")
    assert "anna" in text
    assert "none judged yet" in text
    campaign = Campaign(run_copy / "human" / "small.sqlite")
    result = json.loads((artifact(run_copy, "eval").path / "result.json").read_text())
    assert {(item.prompt, item.answer_a, item.answer_b) for item in campaign.items} == {
        (row["prompt"], row["answer_a"], row["answer_b"]) for row in result["rows"]
    }
    assert (campaign.info.name_a, campaign.info.name_b) == ("SFT", "PPO")
    vote_on(campaign, "b")
    text = run_annotate(capsys, run_copy, "small", "--results")
    count = len(campaign.items)
    assert re.search(rf"PPO better\s+{count} \(100.0 %\)", text)
    assert re.search(r"anna\s+8 of 8", text)


def test_a_study_is_found_again_after_newer_runs_of_its_name(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_campaign(capsys, run_copy, "small", "--annotators", "anna")
    newer = RunRecord("small", "eval", {"eval": "ffff"}, created="2999-01-01T00:00:00+00:00")
    Records(run_copy / "sweeps").write(newer)
    assert "anna" in run_annotate(capsys, run_copy, "small", "--results")


def test_answers_that_are_the_same_are_ties(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = artifact(run_copy, "eval")
    result = json.loads((found.path / "result.json").read_text())
    for row in result["rows"][:3]:
        row["answer_a"] = row["answer_b"] + " "
    put_file(found, "result.json", json.dumps(result).encode())
    create_campaign(capsys, run_copy, "small")
    campaign = Campaign(run_copy / "human" / "small.sqlite")
    assert (len(campaign.items), campaign.info.identical) == (5, 3)
    vote_on(campaign, "b")
    text = run_annotate(capsys, run_copy, "small", "--results")
    assert re.search(r"Tie\s+3 \(37.5 %\)", text)
    assert "8 (5 by people, 3 with identical answers, counted as ties)" in text


def test_a_study_stays_what_it_was_made_as(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--criteria", "helpful,harmless", "--prompts", "5", "--seed", "3")
    create_campaign(capsys, run_copy, "small", *options)
    create_campaign(capsys, run_copy, "small", *options)
    run_annotate(capsys, run_copy, "small", "--results")
    campaign = Campaign(run_copy / "human" / "small.sqlite")
    assert len(campaign.items) == 5
    for option, value, shown in (
        ("--criteria", "overall", "made with --criteria 'helpful,harmless', not 'overall'"),
        ("--seed", "4", "made with --seed '3', not '4'"),
        ("--prompts", "6", "has 5 prompts, not 6"),
    ):
        assert shown in refusal(capsys, run_copy, "small", option, value, "--results")
    text = tmp_path / "words.txt"
    text.write_text("Say which is better.")
    error = refusal(capsys, run_copy, "small", "--instructions", str(text), "--results")
    assert "made with --instructions" in error
    other = jsonl(tmp_path / "small.jsonl", [{"prompt": "p", "answer_a": "x", "answer_b": "y"}])
    assert "made with answers from 'eval/" in refusal(capsys, run_copy, str(other), "--results")
    create_campaign(capsys, run_copy, str(other), "--study", str(tmp_path / "own.sqlite"))
    assert len(Campaign(tmp_path / "own.sqlite").items) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("nothing",), "no run 'nothing'"),
        (("small", "--criteria", "Über Alles"), "is no criterion; expected"),
        (("small", "--criteria", "a,a"), "names none, or one of them twice"),
        (("small", "--prompts", "0"), "must be at least 1"),
        (("small", "--annotators", "0"), "expected 1 to 1000"),
        (("small", "--annotators", "anna,,ben"), "expected a number, or names"),
        (("small", "--import", "csv", "x"), "expected jsonl, labelstudio, groundtruth"),
        (("small", "--export", "csv", "x"), "jsonl, preferences, labelstudio, groundtruth"),
        (("small", "--import", "jsonl", "none.jsonl"), "no such file: none.jsonl"),
        (("small", "--instructions", "none.txt"), "none.txt cannot be read"),
        (("small", "--port", "99999"), "expected 0 to 65535"),
        (("missing.jsonl",), "no such file: missing.jsonl"),
    ],
)
def test_what_cannot_be_done(
    run_copy: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: str
) -> None:
    assert error in refusal(capsys, run_copy, *arguments)


def test_a_run_without_an_evaluation(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = artifact(run_copy, "sft").key
    assert "was not evaluated" in refusal(capsys, run_copy, f"sft/{key}")


def test_exports_and_imports(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_campaign(capsys, run_copy, "small")
    campaign = Campaign(run_copy / "human" / "small.sqlite")
    vote_on(campaign, "a", ("anna", "ben"))
    for kind, read in (
        ("jsonl", ""),
        ("labelstudio", "annotations.json"),
        ("groundtruth", "output.manifest"),
    ):
        path = tmp_path / kind
        run_annotate(capsys, run_copy, "small", "--export", kind, str(path))
        text = run_annotate(
            capsys, run_copy, "small", "--import", kind, str(path / read if read else path)
        )
        assert "16 votes, 0 of them new" in text
    error = refusal(capsys, run_copy, "small", "--export", "preferences", str(tmp_path / "p"))
    assert "those of the evaluation" in error


def fetched(address: str, body: bytes | None = None) -> str:
    """Open an address, waiting for the server to accept connections."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, body, timeout=30) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")


def test_a_killed_server_goes_on(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Served(run_copy, "small") as server:
        start, owner = server.links
        page = fetched(f"{start}/1")
        form = dict(re.findall(r'name="(\w+)" value="([^"]*)">', page))
        body = "&".join(f"{name}={value}" for name, value in form.items()) + "&choice=A"
        assert "Question 2 of 8" in fetched(f"{start}/1", body.encode())
        server.kill()
        server.start()
        assert "1 of 8 answered" in fetched(start)
        # The page that was open all the while is still good, and voting twice counts once.
        assert "1 of 8 answered" in fetched(f"{start}/1", body.encode())
        assert "1 of 8" in fetched(owner)
        error = refusal(capsys, run_copy, "small", "--port", str(server.port))
        assert "cannot listen there: Address already in use" in error
    (vote,) = Campaign(run_copy / "human" / "small.sqlite").votes()
    assert (vote.annotator, vote.choice, vote.revision) == ("annotator-1", Choice.A, 1)


def test_without_the_server_installed(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refusal(capsys, run_copy, "small")
    assert "`pip install starlette uvicorn` (extra `annotate`)" in error
    create_campaign(capsys, run_copy, "small")
    assert "none judged yet" in run_annotate(capsys, run_copy, "small", "--results")


def test_the_loop_of_feedback(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_campaign(capsys, run_copy, "small", "--collect", "--prompts", "30")
    campaign = Campaign(run_copy / "human" / "small-collect.sqlite")
    corpus = DataModule(small_config(run_copy).data).corpus
    asked = {row.history[-1].text for row in corpus.prompts.train}
    held_out = {row.history[-1].text for row in corpus.prompts.test} - asked
    for item in campaign.items:
        last = item.prompt.rpartition("\n\nHuman: ")[2]
        assert last in asked
        assert last not in held_out
        assert item.answer_a != item.answer_b
    assert (campaign.info.name_a, campaign.info.name_b) == ("PPO", "PPO")
    vote_on(campaign, "b")
    votes = tmp_path / "votes.jsonl"
    text = run_annotate(
        capsys, run_copy, "small", "--collect", "--export", "preferences", str(votes)
    )
    assert (
        f"{len(campaign.items)} preferences (overall); left out: 0 ties, 0 without a vote" in text
    )

    sft = artifact(run_copy, "sft").path
    keys = {path.name for path in (run_copy / "store" / "ppo").iterdir()}
    assert (
        launch(
            run_copy,
            "name=second",
            "data=hh_local",
            f"data.preferences={votes}",
            f"sft.use={sft}",
            "data.test_fraction=0.2",
            "eval.prompts=2",
        )
        == 0
    )
    assert len({path.name for path in (run_copy / "store" / "ppo").iterdir()} - keys) == 1


def test_both_answers_belong_to_the_prompt(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def echoed(*given: Any) -> tuple[list[str], list[str]]:
        prompts, _ = texts_of(*given)
        return prompts, [f"{number}: {prompt}" for number, prompt in enumerate(prompts)]

    monkeypatch.setattr("rlhf_exp.commands.annotate.texts_of", echoed)
    items = sampled_pairs(artifact(run_copy, "ppo"), 10, seed=0)
    assert len({item.prompt for item in items}) == 10
    for item in items:
        for answer in (item.answer_a, item.answer_b):
            # The model's own prompt may have been cut on the left; its end is what was asked.
            assert answer.endswith(f"{item.prompt[-40:]}\n\nAssistant:")
    assert items == sampled_pairs(artifact(run_copy, "ppo"), 10, seed=0)
    assert items != sampled_pairs(artifact(run_copy, "ppo"), 10, seed=1)


def test_plain_call(run_copy: Path) -> None:
    from rlhf_exp.commands.annotate import AnnotateOptions, CampaignDesign

    file, tasks = run_copy / "own.sqlite", ("labelstudio", str(run_copy / "tasks"))
    annotate(
        run_copy,
        "small",
        CampaignDesign(prompts=4),
        file,
        AnnotateOptions(annotators="2", write=tasks),
    )
    assert [one.name for one in Campaign(file).annotators()] == ["annotator-1", "annotator-2"]
