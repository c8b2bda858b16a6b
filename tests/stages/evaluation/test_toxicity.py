from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_exp.config.checks import config_problems
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.stages.evaluation.toxicity_scorer import shared_scores
from tests.evaluation.toxicity.test_scorers import MULTI, saved
from tests.lab import artifact, jsonl, run, small_config

FUNCTION = """
def score(texts):
    return [min(1.0, len(text) / 40) for text in texts]
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": {"text": f"The cat number {n} said that", "toxicity": n / 10 if n else None},
            "continuation": {
                "text": " you are a fool" if n % 2 else " it is fine",
                "toxicity": n % 2,
            },
        }
        for n in range(10)
    ]
    return jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTION)
    return f"{tmp_path / 'mine.py'}:score"


def evaluate(folder: Path, prompts: Path, *overrides: str) -> Path:
    """Run the toxicity suite; return the new artifact's folder."""
    settings = ["eval.toxicity.generations=3", "eval.toxicity.max_new_tokens=4"]
    given = {text.partition("=")[0] for text in overrides}
    kept = [text for text in settings if text.partition("=")[0] not in given]
    run(folder, "stage=eval", "eval=toxicity", f"eval.toxicity.data={prompts}", *kept, *overrides)
    return max((folder / "store" / "eval").iterdir(), key=lambda path: path.stat().st_mtime)


def content(folder: Path, name: str) -> Any:
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if "jsonl" in name else json.loads(text)


def test_numbers_follow_from_the_kept_answers(run_copy: Path, prompts: Path, function: str) -> None:
    found = evaluate(
        run_copy, prompts, f"eval.toxicity.scorer={function}", "eval.toxicity.prompts=8"
    )
    summary, samples = content(found, "toxicity.json"), content(found, "samples.jsonl")
    assert len(samples) == 2 * 8 * 3
    asked = {line["row"]: line["facts"] for line in samples if line["sample"] == 0}
    assert all(line["prompt"] == asked[line["row"]]["text"] for line in samples)  # raw
    assert all(line["tokens"] <= 4 for line in samples)
    scores: dict[str, np.ndarray] = {name: np.full((8, 3), np.nan) for name in ("SFT", "PPO")}
    for line in samples:
        value = min(1.0, len(line["text"]) / 40)
        scores[line["model"]][line["row"], line["sample"]] = value
    assert content(found, "toxicity_scores.json") == {
        name: np.round(values, 6).tolist() for name, values in scores.items()
    }
    metrics = content(found, "manifest.json")["metrics"]
    toxic = [row for row in range(8) if (asked[row]["toxicity"] or 0) >= 0.5]
    assert 0 < len(toxic) < 8
    for name, values in scores.items():
        assert metrics[f"toxicity/{name}/mean"] == pytest.approx(values.mean())
        largest = values.max(axis=1)
        assert metrics[f"toxicity/{name}/expected_max"] == pytest.approx(largest.mean())
        assert metrics[f"toxicity/{name}/toxic/expected_max"] == pytest.approx(
            largest[toxic].mean()
        )
    assert summary["scorer"] == "mine.py:score"
    assert {one["texts"]: one["count"] for one in summary["agreement"]} == {
        "prompts": 8 - (None in [one["toxicity"] for one in asked.values()]),
        "continuations": 8,
        "both": 16 - (None in [one["toxicity"] for one in asked.values()]),
    }


def test_continuations_of_a_prompt_differ_and_models_share_the_noise(
    run_copy: Path, prompts: Path
) -> None:
    sft = artifact(run_copy, "sft").path
    found = evaluate(run_copy, prompts, f"eval.models=[sft,{sft}]")
    texts: dict[str, list[str]] = {}
    for line in content(found, "samples.jsonl"):
        texts.setdefault(line["model"], []).append(line["text"])
    first, second = texts.values()
    assert first == second
    assert len(set(first)) > 20  # of 30
    metrics = content(found, "manifest.json")["metrics"]
    differences = [value for name, value in metrics.items() if name.endswith("_difference")]
    assert differences == [0.0] * len(differences)
    assert differences


def test_another_scorer_reads_the_stored_answers(
    run_copy: Path, prompts: Path, function: str
) -> None:
    first = evaluate(run_copy, prompts)
    prompts.unlink()
    scored = (f"eval.samples={first.name}", f"eval.toxicity.scorer={function}")
    again = evaluate(run_copy, Path("gone.jsonl"), *scored)
    assert content(again, "samples.jsonl") == content(first, "samples.jsonl")
    old, new = content(first, "toxicity.json"), content(again, "toxicity.json")
    assert (old["scorer"] != new["scorer"], new["scorer"]) == (True, "mine.py:score")
    assert [one["count"] for one in new["agreement"]] == [one["count"] for one in old["agreement"]]
    assert (old["format"], new["format"]) == ("raw", None)


def test_continuations_have_generation_settings_of_their_own(run_copy: Path, prompts: Path) -> None:
    own = ("eval.toxicity.top_p=0.9", "eval.toxicity.temperature=0.5")
    first = evaluate(run_copy, prompts, "eval.top_k=7", *own)
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 4}
    assert [line["sampling"] for line in content(first, "samples.jsonl")] == [expected] * 60
    summary = content(first, "toxicity.json")
    assert expected.items() <= summary.items()
    report = (run_copy / "reports" / f"eval-{first.name}.html").read_text()
    assert "up to 4 tokens at temperature 0.5, top-k 7, top-p 0.9" in report
    # The answers know how they were made; what the config says now does not count.
    again = evaluate(run_copy, prompts, f"eval.samples={first.name}", "eval.toxicity.label=null")
    assert expected.items() <= content(again, "toxicity.json").items()


def test_a_nucleus_of_one_token_says_the_same_each_time(run_copy: Path, prompts: Path) -> None:
    found = evaluate(run_copy, prompts, "eval.toxicity.top_p=0.000001")
    said: dict[tuple[str, int], set[str]] = {}
    for line in content(found, "samples.jsonl"):
        said.setdefault((line["model"], line["row"]), set()).add(line["text"])
    assert [len(texts) for texts in said.values()] == [1] * 20


def test_answers_in_a_dialogue(run_copy: Path, prompts: Path) -> None:
    found = evaluate(run_copy, prompts, "eval.toxicity.format=dialogue")
    for line in content(found, "samples.jsonl"):
        text = line["prompt"].partition("Human: ")[2]
        assert text.startswith("The cat number")
        assert text.endswith("said that\n\nAssistant:")


def test_a_classifier(run_copy: Path, prompts: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", problem_type="multi_label_classification", **MULTI)
    found = evaluate(run_copy, prompts, f"eval.toxicity.scorer={folder}", "eval.models=[sft]")
    summary = content(found, "toxicity.json")
    assert summary["scorer"] == "bert, label toxic"
    assert summary["models"] == ["SFT"]


class Lengths:
    name = "length"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, texts: list[str]) -> np.ndarray:
        self.seen += texts
        return np.array([len(text) / 10 for text in texts])


def test_each_text_is_scored_once_and_silence_never() -> None:
    scorer = Lengths()
    world = World.__new__(World)
    world.processes, world.rank = 1, 0
    found = shared_scores(scorer, ["abc", " ", "a", "abc", ""], world)
    assert list(found) == [0.3, 0.0, 0.1, 0.3, 0.0]
    assert scorer.seen == ["abc", "a"]
    assert list(shared_scores(scorer, ["", "\n"], world)) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["eval.toxicity.data=gone.jsonl"],
            r"eval\.toxicity\.data=gone\.jsonl: there is nothing at",
        ),
        (["eval.toxicity.data=gone"], r"eval\.toxicity\.data=gone: expected a \.jsonl"),
        (["eval.temperature=0"], r"eval\.toxicity\.generations=5: with eval\.temperature=0"),
        (
            ["eval.toxicity.temperature=0"],
            r"eval\.toxicity\.generations=5: with eval\.toxicity\.temperature=0",
        ),
        (["eval.toxicity.top_p=0"], r"eval\.toxicity\.top_p=0\.0: must be above 0"),
        (["eval.toxicity.top_k=-1"], r"eval\.toxicity\.top_k=-1: must be at least 0"),
        (["eval.toxicity.label=toxic"], r"eval\.toxicity\.label=toxic: goes with a text class"),
        (
            ["eval.toxicity.scorer=gone.py:f"],
            r"eval\.toxicity\.scorer=gone\.py:f: there is no file",
        ),
        (["eval.toxicity.scorer=./gone"], r"eval\.toxicity\.scorer=\./gone: there is no model at"),
        (
            ["eval.toxicity.max_new_tokens=192"],
            r"eval\.toxicity\.max_new_tokens=192: leaves no room",
        ),
    ],
)
def test_mistakes_are_found_in_the_config(
    tmp_path: Path, prompts: Path, overrides: list[str], message: str
) -> None:
    given = overrides[0].startswith("eval.toxicity.data")
    data = [] if given else [f"eval.toxicity.data={prompts}"]
    config = small_config(tmp_path, "eval=blog", *data, *overrides)
    (problem,) = config_problems(config)
    assert re.match(message, str(problem))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"eval\.toxicity\.data=allenai/real-toxicity-prompts: cannot be loaded from the hub"),
        (["eval.toxicity.scorer=org/absent"], "org/absent: no model can be loaded from there"),
    ],
)
def test_what_the_hub_lacks_is_missed_before_training(
    tmp_path: Path, prompts: Path, overrides: list[str], message: str
) -> None:
    data = [f"eval.toxicity.data={prompts}"] if overrides else []
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", "eval=blog", *data, *overrides)
    assert not list((tmp_path / "out").glob("store/*/*"))


def test_the_quick_comparison_is_scored_by_the_scorer_of_the_config(
    run_copy: Path, function: str
) -> None:
    run(run_copy, "stage=eval", f"eval.toxicity.scorer={function}")
    found = max((run_copy / "store" / "eval").iterdir(), key=lambda path: path.stat().st_mtime)
    result = content(found, "result.json")
    assert result["toxicity_scorer"] == "mine.py:score"
    for row in result["rows"]:
        for side in "ab":
            text = row[f"answer_{side}"]
            expected = min(1.0, len(text) / 40) if text.strip() else 0.0
            assert row[f"toxicity_{side}"] == expected
    report = (run_copy / "reports" / f"eval-{found.name}.html").read_text()
    assert "Toxicity is scored by mine.py:score." in report


def test_one_scorer_speaks_in_both_parts(run_copy: Path, prompts: Path, function: str) -> None:
    found = evaluate(run_copy, prompts, f"eval.toxicity.scorer={function}", "eval=blog")
    assert content(found, "result.json")["toxicity_scorer"] == "mine.py:score"
    assert content(found, "toxicity.json")["scorer"] == "mine.py:score"


def test_the_default_scorer_is_called_a_guess(small_run: Path) -> None:
    found = artifact(small_run, "eval")
    assert content(found.path, "result.json")["toxicity_scorer"].startswith("alt-profanity-check")
    report = (small_run / "reports" / f"eval-{found.key}.html").read_text()
    assert "Toxicity is a lexical guess by alt-profanity-check" in report


def test_a_scorer_of_the_quick_suite_is_looked_for_before_training(tmp_path: Path) -> None:
    config = small_config(tmp_path, "eval.toxicity.scorer=gone.py:f")
    (problem,) = config_problems(config)
    assert re.match(r"eval\.toxicity\.scorer=gone\.py:f: there is no file", str(problem))
    with pytest.raises(UserError, match="org/absent: no model can be loaded from there"):
        run(tmp_path / "out", "eval.toxicity.scorer=org/absent")
    assert not list((tmp_path / "out").glob("store/*/*"))


def test_the_quick_suite_needs_no_prompts(tmp_path: Path) -> None:
    config = small_config(tmp_path, "eval.toxicity.data=gone.jsonl")
    assert config_problems(config) == []
