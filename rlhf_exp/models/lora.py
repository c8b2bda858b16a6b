"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on peft's layers.

peft takes seconds to import, so it is imported only where LoRA is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import decoder_parts

ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """The shape of the adapter. It has no dropout: PPO compares two forward passes.

    Attributes:
        rank: r of the update B A; A is [r, inputs], B is [outputs, r].
        alpha: the update is scaled by alpha / rank.
        targets: last parts of the names of the linear layers to adapt; empty: all in the blocks.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()


def add_lora(
    model: PreTrainedModel, settings: LoraSettings, seed: int, blocks: int | None = None
) -> None:
    """Put an adapter into `model` and freeze all else; the model's outputs stay the same.

    Args:
        model: changed in place.
        settings: the adapter's shape.
        seed: of A; B starts at 0.
        blocks: adapt the last so many blocks only; `None`: all.

    Raises:
        UserError: a target is no linear layer of the model's blocks, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora.rank: LoRA needs peft: `pip install peft` (extra `lora`)") from error

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=_target_modules(model, settings.targets, blocks),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:  # small updates are lost in half precision
            parameter.data = parameter.data.float()


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the adapted layers of `model` with their names; empty without LoRA."""
    if not any(name.endswith("base_layer") for name, _ in model.named_modules()):
        return []
    from peft.tuners.lora import LoraLayer

    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Let `model` compute without its adapter, as it did before `add_lora`."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state under its plain names, with the adapter added to the weights.

    The model is left as it is: merging in place and back would change the last bits of its weights.
    """
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in lora_layers(model):
        weight = state[f"{name}.weight"]
        update = layer.get_delta_weight(ADAPTER).float()
        state[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return state


def _target_modules(
    model: PreTrainedModel, targets: tuple[str, ...], blocks: int | None
) -> list[str]:
    """Return the full names of the linear layers to adapt."""
    parts = decoder_parts(model)
    names = {id(module): name for name, module in model.named_modules()}
    stack = list(parts.blocks)
    chosen = stack if blocks is None else stack[-blocks:]
    linear = [
        (path.rsplit(".", 1)[-1], names[id(module)])
        for block in chosen
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    valid = sorted({short for short, _ in linear})
    unknown = sorted(set(targets) - set(valid))
    if unknown:
        raise UserError(
            f"lora.targets: {', '.join(unknown)} is no linear layer in the blocks of a "
            f"{parts.base.config.model_type} model; it has: {', '.join(valid)}"
        )
    return [name for short, name in linear if not targets or short in targets]
