"""Pickled weights: read as tensors alone, converted to safetensors, refused if they hold more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJForSequenceClassification

from rlhf_exp.errors import UserError
from rlhf_exp.model_names import pickled_weight_names
from rlhf_exp.models.pickled_weights import convert_model, convert_reward, read_tensors
from rlhf_exp.models.pretrained import load_causal_lm, load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from tests.models.published_reward import END, PublishedReward, write_published, write_trunk

ROWS = [[5, 9, 7, 250], [17], [8, 8, 3, 2, 1, 44, 260, 31]]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trunk(tmp_path_factory.mktemp("trunk"))


@pytest.fixture
def published(tmp_path: Path, trunk: Path) -> Path:
    return write_published(tmp_path / "published", trunk)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def ours(model: RewardModel) -> Tensor:
    """Return the scores of the rows, ended, by a loaded reward model."""
    ended = [[*row, END] for row in ROWS]
    lengths = torch.tensor([len(row) for row in ended])
    tokens = torch.zeros(len(ended), int(lengths.max()), dtype=torch.long)
    for number, row in enumerate(ended):
        tokens[number, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        return model.scores(tokens, lengths)


def test_the_published_format_scores_as_it_was_published(
    published: Path, trunk: Path, target: Path
) -> None:
    convert_reward(published, str(trunk), target)
    expected = PublishedReward(published, trunk)(ROWS)
    assert expected.std() > 0.1
    assert (ours(RewardModel.load(target)) - expected).abs().max() < 1e-5
    assert not list(target.glob("*.pt"))
    assert load_file(target / "model.safetensors")["h.0.attn.q_proj.weight"].dtype == torch.float16
    assert json.loads((target / "reward_model.json").read_text()) == {"mean": 0.0, "std": 1.0}
    assert load_tokenizer(target).get_vocab() == load_tokenizer(trunk).get_vocab()


def test_it_may_have_a_config_and_a_tokenizer_of_its_own(
    published: Path, trunk: Path, target: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (published / name).write_bytes((trunk / name).read_bytes())
    convert_reward(published, None, target)
    expected = PublishedReward(published, trunk)(ROWS)
    assert (ours(RewardModel.load(target)) - expected).abs().max() < 1e-5


def test_a_classifier_scores_as_the_library_says(trunk: Path, target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    config = AutoModelForCausalLM.from_pretrained(trunk).config
    config.num_labels, config.pad_token_id = 1, END
    model = GPTJForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save({"lr": 1}, folder / "training_args.bin")
    convert_reward(folder, None, target)
    # Its padding is what ends our rows, so the library reads the token before.
    with torch.no_grad():
        expected = [model(torch.tensor([[*row, END]])).logits[0, 0] for row in ROWS]
    assert (ours(RewardModel.load(target)) - torch.stack(expected)).abs().max() < 1e-5


def test_a_language_model_in_several_files(trunk: Path, target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(trunk).eval()
    (folder / "config.json").write_bytes((trunk / "config.json").read_bytes())
    state = list(model.state_dict().items())
    half = len(state) // 2
    index = {"weight_map": {name: "pytorch_model-1.bin" for name, _ in state[:half]}}
    torch.save(dict(state[:half]), folder / "pytorch_model-1.bin")
    torch.save(dict(state[half:]), folder / "pytorch_model-2.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert_model(folder, target)
    tokens = torch.tensor([ROWS[2]])
    with torch.no_grad():
        assert torch.equal(load_causal_lm(target)(tokens).logits, model(tokens).logits)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


def test_tensors_that_share_memory(tmp_path: Path, target: Path) -> None:
    (tmp_path / "model").mkdir()
    tied = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": tied, "b": tied, "c": tied[1]}, tmp_path / "model" / "pytorch_model.bin")
    convert_model(tmp_path / "model", target)
    found = load_file(target / "model.safetensors")
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["b"], tied)
    assert found["c"].tolist() == [3.0, 4.0, 5.0]


class Program:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_run(tmp_path: Path, legacy: bool) -> None:
    file, trap = tmp_path / "hf_ckpt.pt", tmp_path / "trap"
    content = {"v_head.weight": torch.ones(1, 2), "more": Program(trap)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"hf_ckpt\.pt: holds more than tensors.*not unpickled"):
        read_tensors(file)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "step": 3}, r"'step' is a int, and only tensors are read"),
        ({"module": {"a": torch.ones(1)}}, r"'module' is a dict, and only tensors"),
        ([torch.ones(1)], r"holds a list, expected tensors by name"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"'a' is no plain tensor"),
    ],
)
def test_what_is_no_table_of_tensors(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "w.bin")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"version https://git-lfs"])
def test_what_is_no_such_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.bin: .*damaged"):
        read_tensors(tmp_path / "w.bin")


def test_weights_that_do_not_fit_their_trunk(published: Path, trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without a config\.json; .*reward\.trunk="):
        convert_reward(published, None, tmp_path)
    deeper = write_trunk(tmp_path / "deeper", layers=3)
    with pytest.raises(UserError, match=r"it lacks \d+ weights, the first 'h\.2\."):
        convert_reward(published, str(deeper), tmp_path)
    file = published / "hf_ckpt.pt"
    state = torch.load(file, weights_only=True)
    for changed, message in (
        ({"transformer.extra.weight": torch.ones(1)}, r"also has 1 weights, the first 'extra\.w"),
        ({"lm_head.weight": torch.ones(1)}, r"also has 1 weights, the first 'lm_head\.weight'"),
        ({"transformer.wte.weight": torch.ones(9, 16)}, r"wte\.weight has the shape \(9, 16\)"),
        ({"v_head.weight": torch.ones(2, 16)}, r"v_head\.weight has the shape \(2, 16\)"),
    ):
        torch.save(state | changed, file)
        with pytest.raises(UserError, match=message):
            convert_reward(published, str(trunk), tmp_path)


def test_which_files_hold_weights(published: Path, trunk: Path, target: Path) -> None:
    assert pickled_weight_names(["hf_ckpt.pt", "README.md"]) == ["hf_ckpt.pt"]
    assert pickled_weight_names(["model.safetensors", "pytorch_model.bin"]) == []
    assert pickled_weight_names(["pytorch_model.bin", "other.pt"]) == ["pytorch_model.bin"]
    shards = ["pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin"]
    assert pickled_weight_names([*shards, "other.pt"]) == sorted(shards)
    assert pickled_weight_names(["optimizer.pt", "rng_state.pth", "onnx/w.bin", "f.msgpack"]) == []
    (published / "other.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"several files .*\(hf_ckpt\.pt, other\.pt\); leave one"):
        convert_reward(published, str(trunk), target)
