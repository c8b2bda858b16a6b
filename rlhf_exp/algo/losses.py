"""Losses of SFT, reward model, DPO and PPO.

Dimensions: N tokens, B rows, T response tokens.

Each loss is a sum over the given entries divided by `normaliser`, the number of entries of the
*whole* global minibatch: then neither accumulation steps nor the number of processes change the
gradient. The statistics are detached sums over the same entries; add those of all micro-batches,
then divide by `count`. `mask` is bool, or float weights (0 for a padding row).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algo.masks import masked_sum


@dataclass(frozen=True)
class Stats:
    """0-dim detached sums; `a + b` merges those of two micro-batches."""

    def __add__(self, other: Self) -> Self:
        """Return the statistics of both batches: sums are added, of `*_max` the larger is taken."""
        joined = {}
        for field in fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            largest = field.name.endswith("_max")
            joined[field.name] = torch.maximum(own, others) if largest else own + others
        return type(self)(**joined)


@dataclass(frozen=True)
class PairwiseStats(Stats):
    """Statistics of the pairwise loss.

    Attributes:
        correct: weight of the pairs whose chosen side scores higher; a tie counts half.
        count: weight of all pairs.
    """

    correct: Tensor
    count: Tensor


@dataclass(frozen=True)
class DpoStats(Stats):
    """Statistics of DPO's losses, of implicit rewards r = beta (log pi - log pi_ref).

    Attributes:
        correct: weight of the pairs whose chosen side has the higher reward; a tie counts half.
        chosen: sum of the chosen sides' rewards.
        rejected: sum of the rejected sides' rewards.
        count: weight of all pairs.
    """

    correct: Tensor
    chosen: Tensor
    rejected: Tensor
    count: Tensor


@dataclass(frozen=True)
class PolicyStats(Stats):
    """Statistics of the policy loss.

    Attributes:
        clipped: tokens whose clipped loss is the larger one, so that they have no gradient.
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
    """Statistics of the value loss.

    Attributes:
        clipped: tokens whose clipped error is the larger one, so that they have no gradient; a tie
            is none of them.
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
        chosen: [B] scores of the preferred answers.
        rejected: [B] scores of the others.
        weights: [B] of the pairs.
        normaliser: weight of all pairs of the global minibatch.

    Returns:
        The loss (0-dim) and its statistics.
    """
    margin = (chosen.float() - rejected.float()).masked_fill(weights == 0, 0.0)
    loss = -(F.logsigmoid(margin) * weights).sum() / normaliser
    with torch.no_grad():
        correct = (margin.sign() + 1) / 2
        return loss, PairwiseStats((correct * weights).sum(), weights.float().sum())


DpoLossName = Literal["sigmoid", "ipo", "hinge"]


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    normaliser: Tensor | float,
    beta: float,
    kind: DpoLossName,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, DpoStats]:
    """Return DPO's loss, with h = chosen - rejected.

    `sigmoid`: -log sigmoid(beta h) (Rafailov et al. 2023, eq. 7; https://arxiv.org/abs/2305.18290),
    with label smoothing e: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (Mitchell 2023,
    conservative DPO). `ipo`: (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17;
    https://arxiv.org/abs/2310.12036). `hinge`: max(0, 1 - beta h) (Zhao et al. 2023, SLiC).

    Args:
        chosen: [B] log pi - log pi_ref of the preferred responses.
        rejected: [B] of the others.
        weights: [B] of the pairs; what has weight 0 may be anything.
        normaliser: weight of all pairs of the global minibatch.
        beta: strength of the pull to the reference.
        kind: which loss.
        label_smoothing: the probability that a preference is the wrong way round; of `sigmoid`.

    Returns:
        The loss (0-dim) and its statistics.
    """
    chosen, rejected = (side.float().masked_fill(weights == 0, 0.0) for side in (chosen, rejected))
    margin = chosen - rejected
    if kind == "sigmoid":
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1.0 - label_smoothing) * right - label_smoothing * wrong
    elif kind == "ipo":
        losses = (margin - 0.5 / beta).square()
    else:
        losses = torch.relu(1.0 - beta * margin)
    with torch.no_grad():
        stats = DpoStats(
            correct=((margin.sign() + 1) / 2 * weights).sum(),
            chosen=(beta * chosen * weights).sum(),
            rejected=(beta * rejected * weights).sum(),
            count=weights.float().sum(),
        )
    return (losses * weights).sum() / normaliser, stats


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
        logprobs: [B, T] under the policy being trained.
        old_logprobs: [B, T] under the policy that sampled.
        advantages: [B, T], whitened.
        mask: [B, T] bool or weights.
        clip_range: c.
        normaliser: response tokens of the global minibatch.

    Returns:
        The loss (0-dim) and its statistics.
    """
    outside = mask == 0
    # Mask the difference, not the ratio: exp of padding may overflow, and 0 * inf is NaN.
    log_ratio = (logprobs - old_logprobs).float().masked_fill(outside, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.masked_fill(outside, 0.0)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = (torch.maximum(unclipped_loss, clipped_loss) * mask).sum() / normaliser
    with torch.no_grad():
        stats = PolicyStats(
            clipped=((clipped_loss > unclipped_loss) * mask).sum().float(),
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
        values: [B, T] of the value function being trained.
        old_values: [B, T] of the value function at the time of sampling.
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
    change = values - old_values
    # Within the range the value itself: the sum would differ from it by rounding, and count.
    clipped_values = torch.where(
        change.abs() <= clip_range, values, old_values + change.clamp(-clip_range, clip_range)
    )
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * (torch.maximum(error, clipped_error) * mask).sum() / normaliser
    with torch.no_grad():
        stats = ValueStats(
            clipped=((clipped_error > error) * mask).sum().float(),
            squared_error=(error * mask).sum(),
            count=mask.sum().float(),
        )
    return loss, stats


def entropy_bonus(entropy: Tensor, mask: Tensor, normaliser: Tensor | float) -> Tensor:
    """Return the mean entropy (0-dim, nats); *subtract* it from the loss, times its coefficient.

    Args:
        entropy: [B, T] of the policy's distribution at each response token.
        mask: [B, T] bool or weights.
        normaliser: response tokens of the global minibatch.
    """
    return masked_sum(entropy, mask) / normaliser
