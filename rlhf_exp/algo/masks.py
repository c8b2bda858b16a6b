"""Masks by length, and masked sums, means and variances.

Dimensions: B rows, T response tokens.

A masked-out entry never reaches a result, even if it is infinite or NaN: it is replaced by 0
before it is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_mask(response_lengths: Tensor, width: int) -> Tensor:
    """Return [B, T] bool, True at the first `response_lengths[b]` of `width` columns.

    Args:
        response_lengths: [B] int64.
        width: T.
    """
    columns = torch.arange(width, device=response_lengths.device)
    return columns < response_lengths.unsqueeze(1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum (0-dim) of `x` weighted by `mask`, of the same shape: bool, or weights."""
    return (x.masked_fill(mask == 0, 0.0) * mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (0-dim) of `x` weighted by `mask`; 0 if the mask is empty."""
    return masked_sum(x, mask) / mask.sum().clamp_min(torch.finfo(torch.float32).tiny)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Return the variance (0-dim) of `x` weighted by `mask`; 0 if the mask is empty.

    Args:
        x: any shape.
        mask: of the same shape, bool or weights.
        unbiased: divide by the mask's sum less 1 (and at least 1), not by its sum.
    """
    squares = masked_sum((x - masked_mean(x, mask)).square(), mask)
    count = mask.sum()
    if unbiased:
        return squares / (count - 1).clamp_min(1)
    return squares / count.clamp_min(torch.finfo(torch.float32).tiny)
