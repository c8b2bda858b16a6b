"""Generalised advantage estimation over response tokens (Schulman et al. 2016).

Dimensions: B rows, T response tokens. A response is an episode: its first L columns are its tokens,
and after the last one there is nothing to expect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.algo.masks import masked_mean, masked_var

WHITEN_EPSILON = 1e-8


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both [B, T] float32 and 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} (eqs. 11, 16), with
    V = A = 0 after the last response token; returns are A + V.

    Args:
        rewards: [B, T] per token.
        values: [B, T]; column t is the estimate *before* token t.
        mask: [B, T] bool, True on the first L columns of each row.
        gamma: discount.
        lam: decay of the traces: 0 trusts the values, 1 the rewards.
    """
    outside = ~mask.bool()
    rewards = rewards.float().masked_fill(outside, 0.0)
    values = values.float().masked_fill(outside, 0.0)
    advantages = torch.zeros_like(values)
    following_value = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    # Outside the mask rewards and values are 0, hence so are the advantages: nothing to reset.
    for column in range(values.shape[1] - 1, -1, -1):
        surprise = rewards[:, column] + gamma * following_value - values[:, column]
        following = surprise + gamma * lam * following
        following_value = values[:, column]
        advantages[:, column] = following
    return advantages, advantages + values


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, mean: Tensor | float | None = None, std: Tensor | float | None = None
) -> Tensor:
    """Return (x - mean) / std inside the mask [B, T], and 0 outside.

    The variance is the biased one, over the number of tokens and not one less: the result has mean
    0 and mean square 1.

    Args:
        x: [B, T].
        mask: [B, T] bool.
        mean: of all ranks' tokens; of `x` inside the mask if None.
        std: of all ranks' tokens, given together with `mean`.
    """
    assert (mean is None) == (std is None), "mean and std go together"
    if mean is None or std is None:
        mean, std = masked_mean(x, mask), masked_var(x, mask).sqrt()
    return ((x - mean) / (std + WHITEN_EPSILON)).masked_fill(~mask.bool(), 0.0)
