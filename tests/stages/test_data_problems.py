"""Bad data and bad models, from the command line to the message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.lab import artifact, jsonl, launch, pairs


def told(capfd: pytest.CaptureFixture[str], outputs: Path, *arguments: str) -> str:
    capfd.readouterr()
    assert launch(outputs, *arguments) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error:") :]


def test_not_json_on_line_17(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[object] = [*pairs(30)]
    rows[16] = '{"prompt": "What'
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    arguments = ["stage=sft", "data=hh_local", f"data.preferences={path}", "sft.steps=2"]
    message = told(capfd, tmp_path / "outputs", *arguments, "data.max_bad_fraction=0")
    assert f"{path}:17: not JSON" in message
    assert "data.max_bad_fraction=0" in message

    # One of 30 is few enough to go on, and is told.
    assert launch(tmp_path / "outputs", *arguments) == 0
    assert f"{path}:17: not JSON" in caplog.text
    facts = json.loads((artifact(tmp_path / "outputs", "sft").path / "facts.json").read_text())
    assert facts["rejected"] == 1


def test_no_pair_usable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Hello?", "chosen": "same", "rejected": "same"}] * 3
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    message = told(capfd, tmp_path / "outputs", "data=hh_local", f"data.preferences={path}")
    assert "no usable row to train on (3 of 3 rows read are unusable)" in message
    assert f"{path}:1: the responses are identical" in message


def test_no_pairs_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Hello?", "response": "Hi."}] * 3
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    message = told(capfd, tmp_path / "outputs", "data=hh_local", f"data.preferences={path}")
    assert "`chosen` and `rejected` expected, found a demonstration" in message


def test_a_missing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere.jsonl"
    message = told(capfd, tmp_path / "outputs", "data=hh_local", f"data.preferences={path}")
    assert f"data.preferences={path}: there is no file {path}" in message


def test_a_folder_that_is_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for key in ("model.path", "sft.use"):
        message = told(capfd, tmp_path / "outputs", "stage=reward", f"{key}={tmp_path / 'empty'}")
        assert str(tmp_path / "empty") in message
        assert "config.json" in message


def test_a_policy_is_no_reward_model(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = artifact(run_copy, "sft").path
    message = told(capfd, run_copy, "stage=ppo", f"reward.use={folder}")
    assert f"{folder / 'model'}: no reward model" in message


def test_a_tokenizer_without_end_of_sequence(
    run_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = artifact(run_copy, "sft").path / "model"
    model = shutil.copytree(source, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(model)
    message = told(capfd, tmp_path / "outputs", "stage=sft", f"model.path={model}")
    assert "has no end-of-sequence token" in message
    assert "eos_token" in message


def test_the_whole_pipeline_on_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", pairs(40))
    test = jsonl(tmp_path / "test.jsonl", pairs(46)[40:])
    outputs = tmp_path / "outputs"
    arguments = ["data=hh_local", f"data.preferences={path}", f"data.test={test}"]
    assert launch(outputs, *arguments) == 0
    result = json.loads((artifact(outputs, "eval").path / "result.json").read_text())
    assert len(result["rows"]) == 6, "the test file's prompts"
    assert result["rows"][0]["gold_b"] is None, "only the toy data has a judge of its own"
    assert artifact(outputs, "reward").manifest.metrics["test/pairs"] == 6
