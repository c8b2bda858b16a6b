"""Models between the transformers of today and that of trlx's time (4.32).

The old one reads `pytorch_model.bin`, merges as `"a b"`, a tokenizer class that it knows, and a
config without later fields.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_exp.errors import UserError

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""The families that both trlx's reference branch and transformers 4.32 know."""
_GPT2 = (
    "n_positions n_embd n_layer n_head n_inner activation_function resid_pdrop embd_pdrop "
    "attn_pdrop layer_norm_epsilon"
)
_LATER = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings"
)
_FIELDS = {
    "gpt2": f"{_GPT2} scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn",
    "gptj": f"{_GPT2} rotary_dim",
    "gpt_neox": f"{_LATER} layer_norm_eps use_parallel_residual attention_dropout hidden_dropout "
    "rotary_emb_base rotary_pct",
    "llama": f"{_LATER} num_key_value_heads rms_norm_eps rope_theta",
}
_COMMON = "vocab_size initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id"
# What the old code takes for granted: another value would be another model.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {"add_cross_attention": False},
    "gptj": {},
    "gpt_neox": {"attention_bias": True, "rope_type": "default"},
    "llama": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_type": "default",
    },
}


def write_old_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a causal language model and its tokenizer as transformers 4.32 reads them.

    Raises:
        UserError: It cannot read this model or tokenizer.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(old_config(model.config), indent=1))
    weights = {old_name(model, name): value.detach() for name, value in model.named_parameters()}
    torch.save(weights, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{tokenizer.name_or_path}: engine=trlx needs a tokenizer with a tokenizer.json"
        )
    path.write_text(json.dumps(old_tokenizer(json.loads(path.read_text(encoding="utf-8")))))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e9),  # lengths are cut before they get there
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        # Without one, trlx invents one that the vocabulary does not have.
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)


def old_name(model: PreTrainedModel, name: str) -> str:
    """Return the name of a parameter in transformers 4.32."""
    if model.config.model_type == "gpt_neox":
        return re.sub(r"^lm_head\.", "embed_out.", name)
    return name


def old_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the `config.json` of a model for transformers 4.32.

    Raises:
        UserError: It does not know this family, or this variant of it.
    """
    family, values = config.model_type, config.to_dict()
    if family not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UserError(f"engine=trlx: trlx cannot train a {family}; its families are {known}")
    values |= values.pop("rope_parameters", None) or {}
    fixed = _FIXED[family]
    if family == "llama":
        fixed = fixed | {"head_dim": values["hidden_size"] // values["num_attention_heads"]}
    odd = [name for name, value in fixed.items() if values.get(name, value) != value]
    if odd:
        listed = ", ".join(f"{name}={values[name]}" for name in odd)
        raise UserError(
            f"engine=trlx: transformers 4.32, which trlx needs, has no {family} with {listed}; "
            "use engine=native"
        )
    if family == "gpt_neox":
        values["rotary_emb_base"] = values["rope_theta"]
        values["rotary_pct"] = values["partial_rotary_factor"]
    fields = f"model_type {_COMMON} {_FIELDS[family]}".split()
    old = {name: values[name] for name in fields if name in values}
    return old | {"architectures": [_CLASSES[family]], "torch_dtype": "float32"}


def old_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    """Return a `tokenizer.json` for tokenizers 0.13.

    Raises:
        UserError: It would cut text in other places.
    """
    model = dict(content["model"])
    if model.pop("ignore_merges", False):
        raise UserError(
            "engine=trlx: this tokenizer looks words up before it merges (ignore_merges), as the "
            "tokenizers of trlx's time cannot; choose another model, or engine=native"
        )
    if model["type"] == "BPE":
        model["merges"] = [
            pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]
        ]
    return content | {"model": model}
