"""Attention masks in the form that a model's attention takes."""

from __future__ import annotations

import torch
from torch import Tensor


def as_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of which position may see which.

    Args:
        allowed: [..., Q, K] bool; each of Q sees at least one of K.
        dtype: `torch.bool` for scaled-dot-product attention; for eager attention, which adds its
            mask, the float type of its scores: 0 where allowed, else the type's least value.
    """
    if dtype == torch.bool:
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)
