"""`rlhf-exp doctor`, and what a run says before its first stage: everything that will not work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from rlhf_exp.cli import main
from rlhf_exp.data.tokenizer import train_tokenizer
from tests.lab import artifact, jsonl, launch, pairs, small


def doctor(folder: Path, *overrides: str) -> int:
    return main(["doctor", *small(folder, *overrides)])


def copied(run: Path, stage: str, target: Path) -> Path:
    """Copy a model out of the store, as a folder that somebody gives."""
    return shutil.copytree(artifact(run, stage).path / "model", target / stage)


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def bert(folder: Path, labels: int) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=300, intermediate_size=8, num_labels=labels, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    train_tokenizer(["x"], 258).save_pretrained(folder)


def test_a_sound_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path / "outputs") == 0
    assert capsys.readouterr().out == "nothing was found that will not work\n"
    assert not (tmp_path / "outputs" / "store").exists()


def test_everything_is_said_at_once(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = edited(copied(small_run, "sft", tmp_path), max_position_embeddings=100)
    reward = copied(small_run, "reward", tmp_path)
    head = reward / "reward_head.safetensors"
    with safe_open(head, "pt") as content:
        save_file({"weight": content.get_tensor("weight")[:, :-1].contiguous()}, head)
    judge = tmp_path / "judge"
    bert(judge, labels=3)
    given = [f"sft.use={policy}", f"reward.use={reward}", f"model.path={tmp_path / 'none'}"]
    judged = ["eval.judge.names=[reward,model]", f"eval.judge.model={judge}"]
    rows = jsonl(tmp_path / "rows.jsonl", pairs(20))
    data = ["data=hh_local", f"data.preferences={rows}", "data.test_fraction=0"]
    problems = [*given, *judged, *data, "ppo.lr=0"]
    assert doctor(tmp_path / "outputs", *problems) == 2
    error = capsys.readouterr().err
    for expected in (
        "ppo.lr=0",
        f"model.path={tmp_path / 'none'}: there is no folder",
        "data: no test prompts to evaluate on",
        f"sft.use={policy}: its positions end at 100 tokens, and rows of up to 128",
        f"reward.use={reward}: {head}: holds a head of shape (1, 31)",
        f"eval.judge.model={judge}: {judge}: 3 labels; a judge is",
    ):
        assert expected in error, expected
    assert error.startswith("error: 6 will not work:\n- ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 2}, "with 2 labels"),
        ({"model_type": "nonesuch"}, "no model can be loaded"),
        ({"vocab_size": 300}, "the embedding 300 rows"),
    ],
)
def test_a_reward_model_that_cannot_score_is_refused_before_sft(
    changes: dict[str, object],
    expected: str,
    small_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reward = edited(copied(small_run, "reward", tmp_path), **changes)
    if "architectures" in changes:
        (reward / "reward_head.safetensors").unlink()
    assert launch(tmp_path / "outputs", "stage=ppo", f"reward.use={reward}") == 2
    error = capfd.readouterr().err
    assert f"error: reward.use={reward}: " in error
    assert expected in error
    assert "running" not in error


def test_an_encoder_is_refused_as_reward_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bert(tmp_path / "bert", labels=1)
    assert launch(tmp_path / "outputs", "stage=ppo", f"reward.use={tmp_path / 'bert'}") == 2
    error = capfd.readouterr().err
    assert "a bert classifier reads in both directions" in error
    assert f"eval.judge.model={tmp_path / 'bert'}" in error


def test_a_folder_for_the_output_that_cannot_be_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert launch(tmp_path / "file" / "below", "plan=true") == 2
    assert f"output_dir={tmp_path / 'file' / 'below'}: {tmp_path / 'file'} is not" in (
        capfd.readouterr().err
    )
    assert launch(Path("/proc/none"), "plan=true") == 2
    assert "output_dir=/proc/none: nothing can be made in /proc" in capfd.readouterr().err


def test_every_length_that_a_models_positions_must_hold(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = edited(copied(small_run, "sft", tmp_path), max_position_embeddings=100)
    lengths = ["dpo.seq_length=110", "dpo.generation.max_new_tokens=8"]
    assert doctor(tmp_path / "outputs", "stage=dpo", f"sft.use={policy}", *lengths) == 2
    error = capsys.readouterr().err
    assert "rows of up to 110 are to be read; lower dpo.seq_length to 100" in error
