"""Causal language models and tokenizers: from a hub, a folder or from scratch, and back.

Only safetensors are read: nothing that is downloaded gets unpickled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.configs import config_of, without_dropout
from rlhf_exp.models.writing import write_model

transformers.logging.disable_progress_bar()  # a stage shows one of its own
# Rows are right-padded and go by lengths, so the advice to pass a mask would mislead.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)

Attention = Literal["sdpa", "eager", "flash_attention_2"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_causal_lm(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
) -> PreTrainedModel:
    """Load a causal language model with every dropout set to 0.

    Args:
        path: a folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights.
        attention: implementation; a family that has no `sdpa` (GPT-J) gets `eager`.

    Raises:
        UserError: `path` is no model, has no safetensors, or lacks some of the weights.
    """
    config = load_config(path, revision)
    return load_pretrained(AutoModelForCausalLM, path, config, revision, dtype, attention)


def load_pretrained(
    kind: Any,  # noqa: ANN401 - one of transformers' auto classes
    path: str | Path,
    config: PreTrainedConfig,
    revision: str | None,
    dtype: torch.dtype,
    attention: Attention,
) -> PreTrainedModel:
    """Load a model of auto class `kind`, with every dropout in `config` set to 0.

    Raises:
        UserError: as for `load_causal_lm`.
    """
    try:
        model, report = kind.from_pretrained(
            path,
            revision=revision or "main",
            config=without_dropout(config),
            dtype=dtype,
            attn_implementation=supported_attention(config, attention),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_no_model(path, error)) from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{path}: {len(missing)} weights of a {type(model).__name__} are not in its "
            f"safetensors files (first: {missing[0]}); give a complete model"
        )
    return ready(model)


def load_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Load the config alone.

    Raises:
        UserError: `path` is no model.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{path}: the folder has no config.json, so it is no model; give a folder "
            "written by save_pretrained (config.json and *.safetensors)"
        )
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith((".", "~"))):
        raise UserError(f"{path}: no such folder; give a model's folder, or a hub id")
    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_no_model(path, error)) from error


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a hub id.

    Raises:
        UserError: there is none at `path`.
    """
    # transformers makes up an empty tokenizer for a folder that has none.
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path}: no tokenizer in the folder (none of {', '.join(TOKENIZER_FILES)}); save one "
            "there with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(
            f"{path}: no tokenizer can be loaded from there ({_first_line(error)}); a model folder "
            "needs a tokenizer.json and tokenizer_config.json"
        ) from error


def build_causal_lm(
    architecture: Architecture,
    seed: int,
    eos_id: int | None = None,
    pad_id: int | None = None,
    bos_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "sdpa",
) -> PreTrainedModel:
    """Build a model from scratch, its weights a function of `seed`.

    torch's own generator is left alone.
    """
    config = config_of(architecture, eos_id=eos_id, pad_id=pad_id, bos_id=bos_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=supported_attention(config, attention)
        )
    return ready(model)


def meta_model(architecture: Architecture) -> PreTrainedModel:
    """Return a model of this shape without any weights, on torch's meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(architecture))


def save_causal_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a plain Hugging Face folder: config, safetensors, tokenizer."""
    write_model(model, folder)
    tokenizer.save_pretrained(folder)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """Let every token train: some families give the padding token's embedding no gradient.

    Where padding and end-of-sequence are one token, that would freeze a token that has a meaning.
    """
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    return model


def supported_attention(config: PreTrainedConfig, attention: Attention) -> str:
    """Return `attention`, or `eager` where the family has no scaled-dot-product attention."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if attention == "sdpa" and model_class is not None and not model_class._supports_sdpa:
        return "eager"
    return attention


def _no_model(path: str | Path, error: BaseException) -> str:
    return (
        f"{path}: no model can be loaded from there ({_first_line(error)}); give a folder with "
        "config.json and *.safetensors, or a hub id"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
