"""Parts of models, found by structure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models.families import TESTED, decoder_parts

Build = Callable[..., PreTrainedModel]
NAMES = {  # blocks, final norm, learned positions: transformers' own names
    "gpt2": ("h", "ln_f", "wpe"),
    "gptj": ("h", "ln_f", None),
    "gpt_neox": ("layers", "final_layer_norm", None),
    "llama": ("layers", "norm", None),
    "qwen2": ("layers", "norm", None),
    "qwen3": ("layers", "norm", None),
}


def test_parts_are_found(tiny: Build, family: str) -> None:
    model = tiny(family)
    for whole in (model, model.base_model):
        parts = decoder_parts(whole)
        assert (parts.blocks_name, parts.norm_name, parts.positions) == NAMES[family]
        assert parts.base is model.base_model
        assert len(parts.blocks) == 4
        assert tuple(parts.embedding.weight.shape) == (89, 32)
        assert (parts.head is None) == (whole is not model)
    assert decoder_parts(model).tied == (family in ("gpt2", "qwen3"))


def test_every_family_is_in_these_tests() -> None:
    assert set(NAMES) == TESTED


def test_model_built_otherwise_is_refused() -> None:
    config = OPTConfig(
        vocab_size=20, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="a 'opt' model is not built as one stack"):
        decoder_parts(AutoModelForCausalLM.from_config(config))


def test_unknown_part_beside_the_blocks_is_named(tiny: Build) -> None:
    model = tiny("llama")
    model.base_model.project_in = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"project_in \(Linear\)"):
        decoder_parts(model)
