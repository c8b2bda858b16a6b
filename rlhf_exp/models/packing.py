"""Attention masks of packed rows: each token attends to the earlier tokens of its own sequence.

A row that holds one sequence and padding needs no mask at all: causal attention lets no real token
see the padding to its right. B rows, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_exp.batch import Demonstrations
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import to_attention_mask

Mask = Tensor | dict[str, Tensor]


def packed_attention_mask(
    segments: Tensor, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """Return the block-diagonal causal mask of packed rows.

    Args:
        segments: [B, S] int64, 1, 2, ... for the sequences of a row, 0 for padding. Padding attends
            to padding: a row of attention with nothing to attend to would be undefined.
        dtype: of the mask, see `to_attention_mask`.
        window: tokens that a sliding window reaches back, itself included; unlimited where `None`.

    Returns:
        [B, 1, S, S].
    """
    position = torch.arange(segments.shape[1], device=segments.device)
    distance = position[:, None] - position
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    mask = (allowed & (segments[:, :, None] == segments[:, None, :]))[:, None]
    return to_attention_mask(mask, dtype)


def packed_mask_for(model: PreTrainedModel, segments: Tensor) -> Mask | None:
    """Return the mask of `segments` [B, S] in the form `model` takes, `None` where none is needed.

    Raises:
        UserError: rows are packed and the model runs on flash attention, which takes no mask.
    """
    if int(segments.max()) <= 1:
        return None
    config = model.config
    attention = config._attn_implementation
    if "flash" in attention:
        raise UserError(
            f"model.attention={attention} cannot run packed rows; set packing=false in the stage's "
            "section (sft.packing, dpo.packing) or model.attention=sdpa"
        )
    dtype = torch.bool if attention == "sdpa" else model.dtype
    full = packed_attention_mask(segments, dtype)
    window = _window(config)
    if window is None:
        return full
    sliding = packed_attention_mask(segments, dtype, window)
    layer_types = getattr(config, "layer_types", None)
    return (
        sliding if layer_types is None else {"full_attention": full, "sliding_attention": sliding}
    )


def packed_inputs(model: PreTrainedModel, batch: Demonstrations) -> dict[str, Any]:
    """Return what `model`, or a slice of it, is called with beside the tokens of packed rows.

    Raises:
        UserError: see `packed_mask_for`.
    """
    mask = packed_mask_for(model, batch.segments)
    return {} if mask is None else {"attention_mask": mask, "position_ids": batch.positions}


def _window(config: PreTrainedConfig) -> int | None:
    """Return the width of the sliding window, `None` for a model that has none."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
