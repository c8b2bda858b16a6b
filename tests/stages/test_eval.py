from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.data.toy.judge import gold_score
from rlhf_exp.errors import UserError
from rlhf_exp.stages.materials import Materials
from tests.lab import artifact, jsonl, pairs, run, small_config


def test_what_the_artifact_holds(small_run: Path) -> None:
    found = artifact(small_run, "eval")
    result = json.loads((found.path / "result.json").read_text())
    rows = result["rows"]
    tests = Materials(small_config(small_run).data).corpus.prompts.test
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
    newest = max((run_copy / "store" / "eval").iterdir(), key=lambda path: path.stat().st_mtime)
    result = json.loads((newest / "result.json").read_text())
    assert all(row["answer_a"] == row["answer_b"] for row in result["rows"])
    metrics = json.loads((newest / "manifest.json").read_text())["metrics"]
    assert metrics["eval/kl_sequence/b"] == 0.0
    assert metrics["eval/outcome/ties"] == 8


def test_no_test_rows(run_copy: Path, tmp_path: Path) -> None:
    preferences = jsonl(tmp_path / "pairs.jsonl", pairs(10))
    with pytest.raises(UserError, match=r"no test prompts .*data\.test or a test_fraction"):
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


def test_models_of_different_tokenizers_have_no_kl(run_copy: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", "stage=sft", "model.architecture.vocabulary=290", "sft.steps=1")
    other = artifact(tmp_path / "other", "sft").path
    with pytest.raises(UserError, match="different tokenizers"):
        run(run_copy, "stage=eval", f"ppo.use={other}")


def test_answers_that_leave_no_room_for_a_prompt(run_copy: Path) -> None:
    with pytest.raises(UserError, match="leaves 0 tokens for a prompt"):
        run(run_copy, "eval.max_new_tokens=128")
