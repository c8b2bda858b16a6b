from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.data.tokenized import tokenize_demonstrations
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.stages.data_module import DataModule
from tests.lab import artifact, jsonl, pairs, run, small_config, weights


def test_what_the_artifact_holds(small_run: Path) -> None:
    found = artifact(small_run, "sft")
    found.verify()
    names = set(found.manifest.files)
    assert names >= {
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "metrics.jsonl",
        "facts.json",
    }
    assert not [name for name in names if name.startswith(("checkpoints", "best", "."))]
    manifest = found.manifest
    assert manifest.config["sft"]["steps"] == 6
    assert (manifest.parents, manifest.inputs) == ({}, {})
    assert manifest.objective == -manifest.metrics["eval/loss"]
    assert manifest.metrics["published_step"] == 6, "so few steps only improve"
    assert "rlhf_exp/training/sft.py" in manifest.code
    facts = json.loads((found.path / "facts.json").read_text())
    assert (facts["rows"], facts["rejected"]) == (60, 0)
    assert facts["packed_rows"] < 60
    assert facts["trainable"] == facts["parameters"]


def test_transformers_loads_it_and_measures_the_same_loss(small_run: Path) -> None:
    found = artifact(small_run, "sft")
    model = AutoModelForCausalLM.from_pretrained(found.path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(found.path / "model")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == json.loads((found.path / "facts.json").read_text())["parameters"]
    rows = DataModule(small_config(small_run).data).corpus.demonstrations.validation
    tokens = tokenize_demonstrations(rows, Codec(tokenizer, "hh"), 192)
    losses = []
    with torch.no_grad():
        for prompt, response in zip(tokens.prompt_ids, tokens.response_ids, strict=True):
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
            losses += (-logprobs.gather(1, ids[0, 1:, None])).flatten().tolist()
    expected = sum(losses) / len(losses)  # a mean over all tokens but the first of each dialogue
    assert found.manifest.metrics["eval/loss"] == pytest.approx(expected, abs=1e-4)


def test_a_pretrained_model_in_a_folder(run_copy: Path) -> None:
    folder = artifact(run_copy, "sft").path / "model"
    run(run_copy, "stage=sft", f"model.path={folder}", "model.architecture.layers=3", "sft.lr=1e-9")
    trained = [one for one in (run_copy / "store" / "sft").iterdir() if one != folder.parent]
    assert len(trained) == 1
    metrics = json.loads((trained[0] / "manifest.json").read_text())["metrics"]
    # Hardly trained at all, it is as good as the model it started from.
    before = artifact(run_copy, "ppo")  # any artifact of the run knows where it came from
    assert before.manifest.parents["sft"] == folder.parent.name
    loss = json.loads((folder.parent / "manifest.json").read_text())["metrics"]["eval/loss"]
    assert metrics["eval/loss"] == pytest.approx(loss, abs=1e-4)


def test_only_the_top_block_trains(run_copy: Path, tmp_path: Path) -> None:
    base = artifact(run_copy, "sft").path / "model"
    run(tmp_path / "top", "stage=sft", f"model.path={base}", "sft.train_blocks=1", "sft.steps=2")
    top = artifact(tmp_path / "top", "sft").path / "model"
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(top).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in same
    assert all(name in same for name in before if ".layers.0." in name)
    assert not [name for name in same if ".layers.1." in name and name.endswith("weight")]
    assert "embed_out.weight" not in same


def test_an_adapter_is_merged_into_what_is_published(run_copy: Path, tmp_path: Path) -> None:
    base = artifact(run_copy, "sft").path / "model"
    run(tmp_path / "lora", "stage=sft", f"model.path={base}", "sft.lora.rank=2", "sft.select=last")
    found = artifact(tmp_path / "lora", "sft")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(found.path / "model").state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])]
    facts = json.loads((found.path / "facts.json").read_text())
    assert facts["trainable"] < facts["parameters"] / 4


def test_own_demonstrations_without_validation_rows(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(12)]
    demonstrations = jsonl(tmp_path / "demonstrations.jsonl", rows)
    preferences = jsonl(tmp_path / "preferences.jsonl", pairs(4))
    arguments = [
        "stage=sft",
        "data=hh_local",
        f"data.demonstrations={demonstrations}",
        f"data.preferences={preferences}",
        "data.validation_fraction=0",
        "data.test_fraction=0",
    ]
    run(tmp_path / "outputs", *arguments)
    found = artifact(tmp_path / "outputs", "sft")
    assert json.loads((found.path / "facts.json").read_text())["rows"] == 12
    assert found.manifest.metrics["eval/loss"] > 0, "the training rows stood in"


def test_the_same_seed_gives_the_same_bits(small_run: Path, tmp_path: Path) -> None:
    run(tmp_path, "stage=sft")
    assert weights(artifact(tmp_path, "sft")) == weights(artifact(small_run, "sft"))


def test_a_folder_that_lacks_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(UserError, match="no weights; a model"):
        run(tmp_path, "stage=sft", f"model.path={tmp_path / 'model'}")
