"""Between an `Architecture` and transformers' config of a model of that shape."""

from __future__ import annotations

import math

from transformers import AutoConfig, PreTrainedConfig

from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import TYPES, Architecture


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout in `config` to 0: PPO compares log-probabilities of two forwards."""
    for name, value in config.to_dict().items():
        if isinstance(value, int | float) and name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    return config


def config_of(
    architecture: Architecture,
    eos_id: int | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> PreTrainedConfig:
    """Return transformers' config of a model of this shape, without dropout."""
    shape = architecture
    if shape.type not in TYPES:
        raise UserError(
            f"model.architecture.type={shape.type!r}: expected one of {', '.join(TYPES)}"
        )
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        # "Small init" (Nguyen and Salazar 2019): the libraries' 0.02 suits widths near 1000, and
        # costs a narrow model a fifth of its training before it begins to learn.
        "initializer_range": math.sqrt(2.0 / (5.0 * shape.width)),
    }
    if shape.type in ("gpt2", "gptj"):
        fields["n_inner"] = shape.ffn_width
    else:
        fields["intermediate_size"] = shape.ffn_width
    if shape.type == "gptj":
        fields["rotary_dim"] = min(64, shape.width_per_head)
    if shape.type in ("llama", "qwen2", "qwen3"):
        fields["num_key_value_heads"] = shape.key_value_heads
    if shape.type in ("llama", "qwen3"):
        fields["head_dim"] = shape.width_per_head
    return without_dropout(AutoConfig.for_model(shape.type, **fields))


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the shape that a loaded config describes."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Architecture(
        type=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        ffn_width=inner or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        kv_heads=getattr(config, "num_key_value_heads", None),
        tied=bool(config.tie_word_embeddings),
        head_width=getattr(config, "head_dim", None),
    )
