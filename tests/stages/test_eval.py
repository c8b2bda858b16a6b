from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.data.toy.gold_judge import gold_score
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.stages.data_module import DataModule
from tests.lab import artifact, jsonl, pairs, run, small_config


def test_what_the_artifact_holds(small_run: Path) -> None:
    found = artifact(small_run, "eval")
    result = json.loads((found.path / "result.json").read_text())
    rows = result["rows"]
    tests = DataModule(small_config(small_run).data).corpus.prompts.test
    asked = [prompt.history[-1].text for prompt in tests[:8]]
    assert [question in row["prompt"] for question, row in zip(asked, rows, strict=True)] == [
        True
    ] * 8
    metrics = found.manifest.metrics
    for side in ("a", "b"):
        mean = sum(row[f"score_{side}"] for row in rows) / 8
        assert metrics[f"eval/reward/{side}"] == pytest.approx(mean)
    for row in rows:
        assert row["gold_b"] == gold_score(row["prompt"], row["answer_b"]).total
    outcomes = [row["outcome"] for row in rows]
    assert metrics["eval/outcome/wins"] == outcomes.count("win")
    assert found.manifest.parents.keys() == {"sft", "reward", "ppo"}


def test_a_model_against_itself(run_copy: Path) -> None:
    """The same noise for both sides: equal policies give equal answers and no KL."""
    sft = artifact(run_copy, "sft").path
    run(run_copy, "stage=eval", f"ppo.use={sft}", "eval.temperature=0")
    found = newest(run_copy)
    result = json.loads((found / "result.json").read_text())
    assert all(row["answer_a"] == row["answer_b"] for row in result["rows"])
    metrics = json.loads((found / "manifest.json").read_text())["metrics"]
    assert metrics["eval/kl_sequence/b"] == 0.0
    assert metrics["eval/outcome/ties"] == 8


def test_no_test_rows(run_copy: Path, tmp_path: Path) -> None:
    preferences = jsonl(tmp_path / "pairs.jsonl", pairs(10))
    with pytest.raises(
        UserError, match=r"no test prompts .*data\.test, raise data\.test_fraction=0\.0"
    ):
        run(
            run_copy,
            "stage=eval",
            "data=hh_local",
            f"data.preferences={preferences}",
            "data.test_fraction=0",
            *(
                f"{stage}.use={artifact(run_copy, stage).path}"
                for stage in ("sft", "reward", "ppo")
            ),
        )


def newest(outputs: Path) -> Path:
    return max((outputs / "store" / "eval").iterdir(), key=lambda path: path.stat().st_mtime)


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_models_of_different_tokenizers_have_no_kl(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "other", "stage=sft", "model.architecture.vocabulary=290", "sft.steps=1")
    other = artifact(tmp_path / "other", "sft").path
    run(run_copy, "stage=eval", f"ppo.use={other}")
    assert "different tokenizers" in caplog.text
    result = json.loads((newest(run_copy) / "result.json").read_text())
    assert [row["kl_b"] for row in result["rows"]] == [None] * 8
    # The reward model reads what the other model says in its own tokens.
    assert all(math.isfinite(row["score_b"]) for row in result["rows"])


def test_samples_are_kept_with_prompts_and_seeds(small_run: Path) -> None:
    found = artifact(small_run, "eval").path
    result = json.loads((found / "result.json").read_text())
    lines = samples(found)
    sides = {"SFT": "a", "PPO": "b"}
    assert len(lines) == 16
    for line in lines:
        row, side = result["rows"][line["row"]], sides[line["model"]]
        assert (line["part"], line["sample"], line["seed"]) == ("preference", 0, 0)
        assert (line["prompt"], line["text"]) == (row["prompt"], row[f"answer_{side}"])
        assert line["tokens"] == row[f"length_{side}"]
        assert line["score"] == row[f"score_{side}"]
        assert line["finish"] in ("eos", "stop", "length")


def test_three_models(run_copy: Path, tmp_path: Path) -> None:
    """A folder is a model too; it is compared with the first, as every other is."""
    folder = tmp_path / "third"
    shutil.copytree(artifact(run_copy, "sft").path / "model", folder)
    run(run_copy, "stage=eval", f"eval.models=[sft,ppo,{folder}]", "eval.temperature=0")
    found = newest(run_copy)
    comparisons = json.loads((found / "comparisons.json").read_text())
    assert [(one["name_a"], one["name_b"]) for one in comparisons] == [
        ("SFT", "PPO"),
        ("SFT", "third"),
    ]
    assert all(row["answer_a"] == row["answer_b"] for row in comparisons[1]["rows"])
    manifest = json.loads((found / "manifest.json").read_text())
    assert manifest["metrics"]["eval/third/outcome/ties"] == 8
    assert manifest["metrics"]["eval/third/kl_sequence/b"] == 0.0
    assert str(folder) in manifest["parents"]


def test_given_models_alone_need_no_training(run_copy: Path, tmp_path: Path) -> None:
    made = {stage: artifact(run_copy, stage).path for stage in ("sft", "ppo", "reward")}
    outputs = tmp_path / "elsewhere"
    models = f"eval.models=[{made['sft']},{made['ppo'] / 'model'}]"
    run(outputs, "stage=eval", models, f"reward.use={made['reward']}", "data.toy.test=8")
    assert not {path.name for path in (outputs / "store").iterdir()} & {"sft", "ppo", "reward"}
    result = json.loads((newest(outputs) / "result.json").read_text())
    assert result["name_b"] == "model"


def test_numbers_are_computed_again_without_the_models(run_copy: Path) -> None:
    run(run_copy, "stage=eval", "eval.temperature=0.7")
    first = newest(run_copy)
    for stage in ("sft", "reward", "ppo"):
        shutil.rmtree(artifact(run_copy, stage).path / "model")
    run(run_copy, "stage=eval", f"eval.samples={first.name}", "eval.tie_low=0.499")
    again = newest(run_copy)
    assert again != first
    assert samples(again) == samples(first)
    old, new = (json.loads((path / "result.json").read_text()) for path in (first, again))
    assert new["metrics"] == old["metrics"]
    assert [row["score_b"] for row in new["rows"]] == [row["score_b"] for row in old["rows"]]
    assert new["tie_band"] == [0.499, 0.6]


def test_a_cut_distribution_is_told_and_has_no_kl(run_copy: Path) -> None:
    run(run_copy, "stage=eval", "eval.top_k=1", "eval.top_p=0.9", "eval.seed=3")
    one = newest(run_copy)
    run(run_copy, "stage=eval", "eval.temperature=0", "eval.seed=3")
    other = newest(run_copy)
    texts = [[line["text"] for line in samples(folder)] for folder in (one, other)]
    assert texts[0] == texts[1], "the most probable token alone is the most probable token"
    result = json.loads((one / "result.json").read_text())
    assert result["sampling"] == "up to 8 tokens at temperature 1, top-k 1, top-p 0.9"
    assert [row["kl_b"] for row in result["rows"]] == [None] * 8
    greedy = json.loads((other / "result.json").read_text())
    assert greedy["sampling"] == "up to 8 tokens, the most probable one each time"
    report = (run_copy / "reports" / f"eval-{one.name}.html").read_text()
    assert "answers of up to 8 tokens at temperature 1, top-k 1, top-p 0.9" in report


def test_results_of_before_sampling_was_told(run_copy: Path) -> None:
    plain = json.loads((artifact(run_copy, "eval").path / "result.json").read_text())
    del plain["sampling"]
    assert ModelComparison.from_json(plain).sampling == ""


def test_stored_samples_that_are_not_there(run_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.samples=nobody: no such .*"):
        run(run_copy, "stage=eval", "eval.samples=nobody")
    broken = tmp_path / "samples.jsonl"
    broken.write_text('{"part": "preference"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not an answer"):
        run(run_copy, "stage=eval", f"eval.samples={broken}")


def test_answers_that_leave_no_room_for_a_prompt(run_copy: Path) -> None:
    with pytest.raises(UserError, match="leaves 0 tokens for a prompt"):
        run(run_copy, "eval.max_new_tokens=128")


def test_people_are_given_the_pairs_that_differ(run_copy: Path) -> None:
    run(run_copy, "stage=eval", "eval=human")
    found = newest(run_copy)
    rows = json.loads((found / "result.json").read_text())["rows"]
    plain = json.loads((found / "people.json").read_text())
    assert plain["names"] == ["SFT", "PPO"]
    assert plain["prompts"] == 8
    assert plain["differ"] == sum(row["answer_a"] != row["answer_b"] for row in rows)
    assert [share for share, _ in plain["needed"]] == [0.6, 0.65, 0.7]
    report = (run_copy / "reports" / f"eval-{found.name}.html").read_text()
    assert f"rlhf-exp annotate {found.name} --annotators 3" in report
