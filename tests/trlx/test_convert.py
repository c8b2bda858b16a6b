"""Models and tokenizers in the form of transformers 4.32.

The old library itself is asked in `tests/stages/test_trlx_ppo.py`, where there is one. Here its
form is read by today's, which still takes it, and compared with what its sources show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.trlx.convert import old_config, old_tokenizer, write_old_model

TEXTS = ("\n\nHuman: Hi there, 12 o'clock?\n\nAssistant:", " It is so.<|endoftext|>", "  ü€\t")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([*TEXTS, "Hi there, it is what it is."], 300)


def model_of(family: str, tied: bool = False) -> PreTrainedModel:
    shape = Architecture(
        type=family,
        layers=2,
        width=32,
        heads=2,
        ffn_width=48,
        vocabulary=300,
        context=64,
        kv_heads=1 if family == "llama" else None,
        tied=tied,
    )
    model = build_causal_lm(shape, seed=3, eos_id=0, pad_id=1)
    with torch.no_grad():  # biases and norms begin at 0 and 1, where a mix-up would not show
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.01 * (number % 7)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama"])
def test_the_old_form_is_the_same_model(
    family: str, tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = model_of(family, tied)
    write_old_model(model, tokenizer, tmp_path / "old")
    assert not list((tmp_path / "old").glob("*.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "old", use_safetensors=False).eval()
    tokens = torch.arange(40)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


def test_the_old_config_of_a_gpt_neox() -> None:
    found = old_config(model_of("gpt_neox").config)
    assert found == {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "torch_dtype": "float32",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # once `rope_parameters`
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
        "initializer_range": pytest.approx((2 / (5 * 32)) ** 0.5),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


def test_the_old_config_of_a_llama() -> None:
    found = old_config(model_of("llama", tied=True).config)
    assert (found["rope_theta"], found["num_key_value_heads"]) == (10000.0, 1)
    assert found["tie_word_embeddings"] is True
    assert not {"rope_parameters", "dtype", "head_dim", "mlp_bias"} & found.keys()


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("llama", {"attention_bias": True}, "has no llama with attention_bias=True"),
        ("llama", {"head_dim": 64}, "has no llama with head_dim=64"),
        ("gpt_neox", {"attention_bias": False}, "has no gpt_neox with attention_bias=False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "has no llama with rope_type=linear",
        ),
    ],
)
def test_variants_that_came_later_are_refused(
    family: str, changes: dict[str, Any], complaint: str
) -> None:
    config = model_of(family).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=complaint):
        old_config(config)


def test_a_family_that_came_later_is_refused() -> None:
    with pytest.raises(UserError, match="cannot train a qwen2; its families are gpt2, gptj"):
        old_config(model_of("qwen2").config)


def test_the_old_tokenizer_makes_the_same_tokens(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_old_model(model_of("gpt2"), tokenizer, tmp_path / "old")
    content = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
    assert "ignore_merges" not in content["model"]
    assert content["model"]["merges"]
    assert all(
        isinstance(pair, str) and pair.count(" ") == 1 for pair in content["model"]["merges"]
    )
    again = Tokenizer.from_file(str(tmp_path / "old" / "tokenizer.json"))
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer(text)["input_ids"]
    settings = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (settings["eos_token"], settings["pad_token"]) == ("<|endoftext|>", "<|pad|>")
    assert settings["clean_up_tokenization_spaces"] is False


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([*TEXTS], 300)
    tokenizer.pad_token = None
    write_old_model(model_of("gpt2"), tokenizer, tmp_path / "old")
    settings = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|endoftext|>"


def test_a_tokenizer_that_looks_words_up_first_is_refused() -> None:
    content = {"model": {"type": "BPE", "ignore_merges": True, "merges": []}}
    with pytest.raises(UserError, match="ignore_merges"):
        old_tokenizer(content)
