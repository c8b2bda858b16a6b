"""The architectures of `conf/model/`, against the models' published parameter counts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from rlhf_exp.config.compose import compose
from rlhf_exp.config.experiment import ArchitectureConfig, Family

# From the models' cards, except GPT-J's, whose card counts other padding of the vocabulary:
# embedding 50400 * 4096, head 50400 * 4096 + 50400, final norm 2 * 4096, and 28 blocks of
# norm 2 * 4096, attention 4 * 4096^2, feed-forward 2 * 4096 * 16384 + 16384 + 4096.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "pythia_160m": 162_322_944,
    "pythia_1b": 1_011_781_632,
    "pythia_6_9b": 6_857_302_016,
    "gptj_6b": 6_050_882_784,
    "gpt_neox_20b": 20_554_567_680,
}


def library_config(shape: ArchitectureConfig) -> PretrainedConfig:
    ffn = shape.ffn_width or 4 * shape.width
    if shape.type is Family.gptj:
        return GPTJConfig(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=ffn,
        )
    kind = {Family.gpt_neox: GPTNeoXConfig, Family.llama: LlamaConfig}[shape.type]
    grouped = {"num_key_value_heads": shape.kv_heads} if shape.type is Family.llama else {}
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=ffn,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        **grouped,
    )


def parameters(option: str) -> int:
    config = library_config(compose([f"model={option}"]).config.model.architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("option", PUBLISHED)
def test_architectures_are_the_real_ones(option: str) -> None:
    assert parameters(option) == PUBLISHED[option]


def test_tiny_is_tiny() -> None:
    assert 1e6 <= parameters("tiny") <= 3e6
