"""The losses of SFT, reward model and PPO.

Dimensions: N tokens, B rows, T response tokens.

Each loss is a sum over the given entries divided by `normaliser`, the number of entries of the
*whole* global minibatch: then neither accumulation steps nor the number of processes change the
gradient. The statistics are detached sums of the same entries, to be added up and divided by their
`count`. `mask` is bool, or float weights (a row that only fills up the batch has weight 0).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algo.masks import masked_sum


@dataclass(frozen=True)
class Stats:
    """0-dim detached sums; `a + b` joins those of two micro-batches."""

    def __add__(self, other: Self) -> Self:
        """Return the statistics of both batches: sums are added, of `*_max` the larger is taken."""
        joined = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            largest = field.name.endswith("_max")
            joined[field.name] = torch.maximum(mine, theirs) if largest else mine + theirs
        return type(self)(**joined)


@dataclass(frozen=True)
class PairwiseStats(Stats):
    """What the pairwise loss saw.

    Attributes:
        correct: weight of the pairs whose chosen side scores higher; a tie counts half.
        count: weight of all pairs.
    """

    correct: Tensor
    count: Tensor


@dataclass(frozen=True)
class PolicyStats(Stats):
    """What the policy loss saw.

    Attributes:
        clipped: tokens whose clipped objective is the worse one: they have no gradient.
        approx_kl: sum of r - 1 - log r, the k3 estimate of KL(old || new).
        ratio_max: the largest probability ratio r.
        count: tokens.
    """

    clipped: Tensor
    approx_kl: Tensor
    ratio_max: Tensor
    count: Tensor


@dataclass(frozen=True)
class ValueStats(Stats):
    """What the value loss saw.

    Attributes:
        clipped: tokens whose clipped value is the worse one: they have no gradient.
        squared_error: sum of (value - return)^2.
        count: tokens.
    """

    clipped: Tensor
    squared_error: Tensor
    count: Tensor


def language_model_loss(logprobs: Tensor, mask: Tensor, normaliser: Tensor | float) -> Tensor:
    """Return the cross-entropy (0-dim).

    Args:
        logprobs: [N] log-probabilities of the target tokens.
        mask: [N] bool or weights.
        normaliser: target tokens of the global minibatch.
    """
    return -masked_sum(logprobs, mask) / normaliser


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, weights: Tensor, normaliser: Tensor | float
) -> tuple[Tensor, PairwiseStats]:
    """Return the Bradley-Terry loss -log sigmoid(chosen - rejected) (Ouyang et al. 2022, eq. 1).

    Args:
        chosen: [B] scores.
        rejected: [B] scores.
        weights: [B].
        normaliser: weight of all pairs of the global minibatch.

    Returns:
        The loss (0-dim) and its statistics.
    """
    margin = (chosen.float() - rejected.float()).masked_fill(weights == 0, 0.0)
    loss = -(F.logsigmoid(margin) * weights).sum() / normaliser
    with torch.no_grad():
        ordered = (margin.sign() + 1) / 2
        return loss, PairwiseStats((ordered * weights).sum(), weights.float().sum())


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    normaliser: Tensor | float,
) -> tuple[Tensor, PolicyStats]:
    """Return PPO's clipped surrogate max(-A r, -A clip(r, 1 +- c)) (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: [B, T] of the policy being trained.
        old_logprobs: [B, T] of the policy that sampled.
        advantages: [B, T], whitened.
        mask: [B, T] bool or weights.
        clip_range: c.
        normaliser: response tokens of the global minibatch.

    Returns:
        The loss (0-dim) and its statistics.
    """
    outside = mask == 0
    # The difference, not the ratio, is masked: exp of padding may overflow, and 0 * inf is NaN.
    log_ratio = (logprobs - old_logprobs).float().masked_fill(outside, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.masked_fill(outside, 0.0)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = (torch.maximum(plain, clipped) * mask).sum() / normaliser
    with torch.no_grad():
        stats = PolicyStats(
            clipped=((clipped > plain) * mask).sum().float(),
            approx_kl=((torch.expm1(log_ratio) - log_ratio) * mask).sum(),
            ratio_max=ratio.masked_fill(outside, 0.0).amax().detach(),
            count=mask.sum().float(),
        )
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    normaliser: Tensor | float,
) -> tuple[Tensor, ValueStats]:
    """Return the clipped value loss 0.5 max((V - R)^2, (Vclip - R)^2).

    Vclip = Vold + clip(V - Vold, +-c), as in OpenAI's baselines; it is not in the PPO paper.

    Args:
        values: [B, T] of the model being trained.
        old_values: [B, T] estimated when sampling.
        returns: [B, T].
        mask: [B, T] bool or weights.
        clip_range: c.
        normaliser: response tokens of the global minibatch.

    Returns:
        The loss (0-dim) and its statistics.
    """
    outside = mask == 0
    values, old_values, returns = (
        tensor.float().masked_fill(outside, 0.0) for tensor in (values, old_values, returns)
    )
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum() / normaliser
    with torch.no_grad():
        stats = ValueStats(
            clipped=((clipped > plain) * mask).sum().float(),
            squared_error=(plain * mask).sum(),
            count=mask.sum().float(),
        )
    return loss, stats


def entropy_bonus(entropy: Tensor, mask: Tensor, normaliser: Tensor | float) -> Tensor:
    """Return the entropy (0-dim, nats) to be *subtracted* from the loss, times its coefficient.

    Args:
        entropy: [B, T] of the policy's distribution at each response token.
        mask: [B, T] bool or weights.
        normaliser: response tokens of the global minibatch.
    """
    return masked_sum(entropy, mask) / normaliser
