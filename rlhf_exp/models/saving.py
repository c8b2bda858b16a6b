"""What is written beside a model: heads, as safetensors with nothing else in them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_exp.errors import UserError
from rlhf_exp.models.writing import write_model

VALUE_HEAD = "value_head.safetensors"
VALUE_MODEL = "value_model"


def save_policy(
    model: PreTrainedModel,
    state: dict[str, Tensor] | None,
    value_head: nn.Module | None,
    value_trunk: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
) -> None:
    """Write `model` as a plain Hugging Face folder, and the value head (and its model) beside it.

    Args:
        model: causal language model.
        state: its state under plain names where its own has others (LoRA); else `None`.
        value_head: written to `value_head.safetensors`.
        value_trunk: written to the folder `value_model`.
        tokenizer: written with the model.
        folder: made where it does not exist.
    """
    plain = model if state is None else with_state(model, state)
    write_model(plain, folder)
    tokenizer.save_pretrained(folder)
    if value_head is not None:
        save_head(value_head, Path(folder) / VALUE_HEAD)
    if value_trunk is not None:
        write_model(value_trunk, Path(folder) / VALUE_MODEL)


def with_state(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """Return a model of the same class and config, made of the tensors in `state`."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(state, assign=True, strict=True)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain


def save_head(head: nn.Module, path: Path) -> None:
    """Write a head's parameters."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()},
        path,
    )


def load_head(head: nn.Module, path: Path) -> None:
    """Read a head's parameters.

    Raises:
        UserError: the file is missing, damaged or another head's.
    """
    try:
        head.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not the head that is expected there ({error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
