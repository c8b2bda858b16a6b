"""What a model's folder tells without its weights being loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BartConfig, BertConfig, LlamaConfig

from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.errors import UserError
from rlhf_exp.models.inspection import (
    check_weight_files,
    policy_problems,
    vocabulary_problems,
)


def test_weights_that_are_whole_in_one_file_or_several(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    check_weight_files(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weight_files(tmp_path)
    check_weight_files("some/hub-id")


def test_weights_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights; a model's folder needs model\.safetensors"):
        check_weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"only pickled weights, pytorch_model\.bin"):
        check_weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"one\.safetensors: cannot be read"):
        check_weight_files(tmp_path)
    save_file({"a": torch.ones(20)}, tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"one\.safetensors: damaged"):
        check_weight_files(tmp_path)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        check_weight_files(tmp_path)


def test_only_a_decoder_is_a_policy() -> None:
    assert list(policy_problems(LlamaConfig())) == []
    assert list(policy_problems(BertConfig(is_decoder=True))) == []
    (problem,) = policy_problems(BertConfig())
    assert "a bert is no causal language model" in problem
    (problem,) = policy_problems(BartConfig())
    assert "bart" in problem


def test_a_token_without_a_row_is_named() -> None:
    tokenizer = train_tokenizer(["x"], 258)
    assert list(vocabulary_problems(LlamaConfig(vocab_size=258), tokenizer)) == []
    assert list(vocabulary_problems(LlamaConfig(vocab_size=300), tokenizer)) == []
    tokenizer.add_tokens(["<new>", "<newer>"])
    (problem,) = vocabulary_problems(LlamaConfig(vocab_size=259), tokenizer)
    assert "260 tokens and the embedding 259 rows: token 259, '<newer>', has none" in problem
    assert "resize_token_embeddings(260)" in problem
