from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from rlhf_exp.data.tokenized import tokenize_demonstrations, tokenize_preferences
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages.data_module import DataModule
from tests.lab import artifact, jsonl, pairs, run, small_config


@pytest.fixture(scope="module")
def trained(small_run: Path) -> Path:
    return artifact(small_run, "reward").path


class ByHand:
    """A reward model read with transformers and safetensors alone."""

    def __init__(self, folder: Path) -> None:
        self.trunk = AutoModel.from_pretrained(folder).eval()
        (self.head,) = load_file(folder / "reward_head.safetensors").values()
        self.mean = json.loads((folder / "reward_model.json").read_text())["mean"]
        self.codec = Codec(AutoTokenizer.from_pretrained(folder), "hh")

    @torch.no_grad()
    def score(self, *parts: np.ndarray) -> float:
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
        return float(self.trunk(ids).last_hidden_state[0, -1] @ self.head.flatten()) - self.mean


def test_held_out_demonstrations_average_0(trained: Path, small_run: Path) -> None:
    model = ByHand(trained / "model")
    rows = DataModule(small_config(small_run).data).corpus.demonstrations.validation
    tokens = tokenize_demonstrations(rows, model.codec, 128)
    scores = [
        model.score(tokens.prompt_ids[row], tokens.response_ids[row]) for row in range(len(rows))
    ]
    assert np.mean(scores) == pytest.approx(0.0, abs=1e-5)
    metrics = artifact(small_run, "reward").manifest.metrics
    assert metrics["demonstrations/std"] == pytest.approx(np.std(scores), rel=1e-3)
    assert metrics["demonstrations/mean_before"] == pytest.approx(model.mean, rel=1e-4)


def test_accuracy_on_test_pairs(trained: Path, small_run: Path) -> None:
    model = ByHand(trained / "model")
    rows = DataModule(small_config(small_run).data).corpus.preferences.test
    tokens = tokenize_preferences(rows, model.codec, 128)
    margins = [
        model.score(tokens.prompt[row], tokens.chosen[row])
        - model.score(tokens.prompt[row], tokens.rejected[row])
        for row in range(len(rows))
    ]
    metrics = artifact(small_run, "reward").manifest.metrics
    right = sum(margin > 0 for margin in margins)
    assert metrics["test/pairs"] == len(rows) == 12
    assert metrics["test/accuracy"] == right / 12
    assert metrics["test/accuracy_low"] < right / 12 < metrics["test/accuracy_high"]
    curve = json.loads((trained / "calibration.json").read_text())
    assert sum(item["count"] for item in curve["bins"]) == 12
    assert curve["error"] == metrics["test/calibration_error"]


def test_what_the_artifact_says(trained: Path, small_run: Path) -> None:
    found = artifact(small_run, "reward")
    found.verify()
    facts = json.loads((trained / "facts.json").read_text())
    # SFT's embedding out is not part of it: vocabulary 320 times width 32; the head adds 32.
    sft = json.loads((artifact(small_run, "sft").path / "facts.json").read_text())
    assert facts["parameters"] == sft["parameters"] - 320 * 32 + 32
    assert facts["trainable"] == facts["parameters"], "counted before it was frozen for scoring"
    assert facts["pairs"] == 60
    assert found.manifest.parents == {"sft": artifact(small_run, "sft").key}
    assert found.manifest.inputs.keys() == {"sft"}
    assert found.manifest.objective == pytest.approx(-found.manifest.metrics["eval/loss"])


def test_from_the_base_model_without_sft(run_copy: Path, tmp_path: Path) -> None:
    base = artifact(run_copy, "sft").path / "model"
    outputs = tmp_path / "base"
    arguments = ["stage=reward", "reward.init=base", f"model.path={base}", "reward.train_blocks=1"]
    arguments.append("reward.select=last")
    run(outputs, *arguments)
    assert not (outputs / "store" / "sft").exists()
    found = artifact(outputs, "reward")
    assert found.manifest.parents == {}
    model = RewardModel.load(found.path / "model")
    before = AutoModel.from_pretrained(base).state_dict()
    same = [
        name for name, value in model.trunk.state_dict().items() if torch.equal(value, before[name])
    ]
    assert "embed_tokens.weight" in same
    assert not [name for name in same if name.startswith("layers.1.") and name.endswith("weight")]


def test_one_held_out_demonstration_and_no_test_pairs(tmp_path: Path) -> None:
    preferences = jsonl(tmp_path / "pairs.jsonl", pairs(2))
    arguments = ["stage=reward", "data=hh_local", f"data.preferences={preferences}"]
    # Of two prompts one is put aside for validation, so one demonstration is all there is.
    run(tmp_path / "outputs", *arguments, "data.validation_fraction=0.4", "data.test_fraction=0")
    found = artifact(tmp_path / "outputs", "reward")
    assert found.manifest.metrics["demonstrations/std"] == 0.0
    assert not [name for name in found.manifest.metrics if name.startswith("test/")]
    assert "calibration.json" not in found.manifest.files
    RewardModel.load(found.path / "model")


def test_training_that_ends_in_its_warm_up_is_warned_of(
    run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What few votes in large batches lead to: a reward model that has hardly moved."""
    run(run_copy, "stage=reward", "reward.warmup_steps=6")
    assert "reward takes 6 optimizer steps, all of them in its warm-up of 6" in caplog.text
    assert "never comes to reward.lr=" in caplog.text
    caplog.clear()
    run(run_copy, "stage=reward", "reward.warmup_steps=5")
    assert "warm-up" not in caplog.text
