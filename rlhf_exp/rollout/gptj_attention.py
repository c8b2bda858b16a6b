"""Attention of GPT-J while it is sampled from on a GPU in half precision: torch's fused kernel.

The library has none for this family. It widens the queries and all the keys of the cache to float32
at every token, which reads and writes several times what the attention itself reads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

log = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Largest difference between the two ways, as a share of the largest output: roundings of half
precision."""

_RIGHT: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether the fused kernel's outputs are the library's, by model; where it has been tried."""


@contextmanager
def fused_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute GPT-J's attention by the fused kernel while the context lasts, in half precision.

    The first time, both ways are compared: where they differ, the library's stays, after a warning.

    Args:
        model: of any family; others are left alone.
    """
    layers = [module for module in model.modules() if type(module) is GPTJAttention]
    for layer in layers:
        layer.__dict__["_attn"] = partial(_attend, model, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_attn"]


def _attend(
    model: PreTrainedModel,
    layer: GPTJAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [N, H, Q, E], as the library's `_attn` does; its weights are not kept."""
    if value.dtype == torch.float32 or not _RIGHT.get(model, True):
        return type(layer)._attn(layer, query, key, value, attention_mask)
    output = scaled_dot_product_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        attn_mask=None if attention_mask is None else attention_mask.to(value.dtype),
        scale=1.0 / layer.scale_attn,
    )
    if model not in _RIGHT:
        expected, weights = type(layer)._attn(layer, query, key, value, attention_mask)
        error = (output.float() - expected.float()).abs().max() / expected.float().abs().max()
        _RIGHT[model] = bool(error <= TOLERANCE)
        if not _RIGHT[model]:
            log.warning(
                "the fused attention of this GPU differs from GPT-J's own by %.2g of the largest "
                "output, so the own one is used: sampling is right, but slower",
                error.item(),
            )
            return expected, weights
    return output, None
