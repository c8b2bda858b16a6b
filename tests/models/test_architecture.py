"""Parameter counts against real models on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from rlhf_exp.models.architecture import Architecture, count_lora, count_parameters
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.lora import LoraSettings, add_lora, lora_layers
from rlhf_exp.models.pretrained import architecture_of, meta_model

Build = Callable[..., PreTrainedModel]

# Shapes of published models; the totals in comments are those their model cards round.
PUBLISHED = {
    "gpt2": Architecture("gpt2", 12, 768, 12, 3072, 50257, 1024, tied=True),  # 124M
    "gptj_6b": Architecture("gptj", 28, 4096, 16, 16384, 50400, 2048),  # 6.05B
    "pythia_160m": Architecture("gpt_neox", 12, 768, 12, 3072, 50304, 2048),  # 162M
    "pythia_6_9b": Architecture("gpt_neox", 32, 4096, 32, 16384, 50432, 2048),  # 6.86B
    "gpt_neox_20b": Architecture("gpt_neox", 44, 6144, 64, 24576, 50432, 2048),  # 20.6B
    "smollm2_135m": Architecture(
        "llama", 30, 576, 9, 1536, 49152, 8192, kv_heads=3, tied=True
    ),  # 135M
    "llama_2_7b": Architecture("llama", 32, 4096, 32, 11008, 32000, 4096),  # 6.74B
    "qwen2_0_5b": Architecture(
        "qwen2", 24, 896, 14, 4864, 151936, 32768, kv_heads=2, tied=True
    ),  # 0.49B
    "qwen3_0_6b": Architecture(
        "qwen3", 28, 1024, 16, 3072, 151936, 40960, kv_heads=8, tied=True, head_width=128
    ),  # 0.6B
}


@pytest.fixture(params=list(PUBLISHED))
def shape(request: pytest.FixtureRequest) -> Architecture:
    return PUBLISHED[request.param]


def test_counts_are_those_of_the_model(shape: Architecture) -> None:
    model = meta_model(shape)
    parts = decoder_parts(model)
    count = count_parameters(shape)
    assert count.total == model.num_parameters()
    assert count.trunk == parts.base.num_parameters()
    assert count.block == sum(p.numel() for p in parts.blocks[-1].parameters())
    assert count.norm == sum(p.numel() for p in parts.norm.parameters())
    assert architecture_of(model.config).differences(shape) == []


def test_gptj_6b_by_hand() -> None:
    # embedding 50400 * 4096 = 206,438,400; a block: norm 8192, four 4096^2 = 67,108,864,
    # 2 * 4096 * 16384 + 16384 + 4096 = 134,238,208, together 201,355,264, and 28 of them
    # 5,637,947,392; final norm 8192; head 206,438,400 + 50400 = 206,488,800.
    count = count_parameters(PUBLISHED["gptj_6b"])
    assert count.total == 206_438_400 + 5_637_947_392 + 8_192 + 206_488_800 == 6_050_882_784
    assert count.trainable(2, tied=False) == 2 * 201_355_264 + 8_192 + 206_488_800
    assert count.trainable(2, tied=True) == 2 * 201_355_264 + 8_192
    assert count.trainable(None, tied=False) == count.total


def test_adapter_is_counted_as_peft_makes_it(tiny: Build, family: str) -> None:
    model = tiny(family)
    add_lora(model, LoraSettings(rank=3), seed=0, blocks=2)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made == count_lora(architecture_of(model.config), 3, 2)
    assert lora_layers(model)


def test_tied_gptj_keeps_the_bias_of_its_head() -> None:
    shape = Architecture("gptj", 1, 16, 2, 32, 50, 8, tied=True)
    assert count_parameters(shape).total == meta_model(shape).num_parameters()


def test_differences_name_the_field_and_both_values() -> None:
    shape = PUBLISHED["gpt2"]
    assert shape.differences(replace(shape, kv_heads=12, head_width=64)) == []
    assert shape.differences(replace(shape, layers=24)) == ["layers: 12 against 24"]


def test_unknown_type_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'bert': expected one of gpt2, gptj"):
        count_parameters(replace(PUBLISHED["gpt2"], type="bert"))
