"""From scores of responses to advantages of tokens: reward shaping, and the estimators.

Dimensions: B rows, T response tokens, N responses of all processes in groups of k to one prompt.

The order in PPO: `subtract_original_scores`, `clip_scores`, `RewardScaler.scale`, `shape_rewards`,
`gae`, `whiten`. Scores are never centred, because the advantages are whitened. A response is an
episode: its first L columns are its tokens, and the value after the last one is 0.

Instead of `gae` and `whiten`, without a value function: `leave_one_out` (RLOO) or `group_relative`
(GRPO) of whole responses' rewards, or `rewards_to_go` and `whiten` (REINFORCE++).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_exp.algo.kl import ESTIMATORS, KlEstimatorName
from rlhf_exp.algo.masks import masked_mean, masked_var
from rlhf_exp.algo.rounding import ROUNDING, divisor, is_rounding

WHITEN_EPSILON = 1e-8
ScaleMode = Literal["none", "running", "reference"]
SCALE_MODES: tuple[ScaleMode, ...] = ("none", "running", "reference")


def subtract_original_scores(scores: Tensor, original_scores: Tensor) -> Tensor:
    """Return the scores [B] less those [B] of the data set's own responses to the same prompts."""
    return scores - original_scores


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Return the scores [B] clipped to +-`limit`."""
    return scores.clamp(-limit, limit)


class RewardScaler:
    """Divides scores by a standard deviation, unless that is nothing but rounding.

    Args:
        mode: whose standard deviation: `none` divides by nothing, `running` by that of all scores
            so far, the present ones included, `reference` by that of the first iteration.
    """

    def __init__(self, mode: ScaleMode) -> None:
        if mode not in SCALE_MODES:
            raise ValueError(f"reward scaling {mode!r}: expected one of {', '.join(SCALE_MODES)}")
        self.mode = mode
        self.moments = RunningMoments()
        self._largest = 0.0

    @property
    def all_equal(self) -> bool:
        """Whether the scores that count are known to be equal, but for rounding."""
        return self.moments.count > 1 and is_rounding(self.moments.spread, self._largest)

    @property
    def divisor(self) -> float:
        """What scores are divided by: their standard deviation; 1 if it is unknown or rounding."""
        return divisor(self.moments.spread, self._largest)

    def scale(
        self, scores: Tensor, all_scores: Tensor | None = None, largest: float = 0.0
    ) -> Tensor:
        """Return `scores` [B] divided by the standard deviation; call it once per iteration.

        Args:
            scores: [B] to be divided.
            all_scores: [N] the iteration's scores of all ranks, without padding rows; they update
                the standard deviation. `scores` if None.
            largest: absolute value of the largest number, on any rank, that the scores were
                computed from, where it is above their own: a difference is rounded as its terms.
        """
        if self.mode == "none":
            return scores
        if self.mode == "running" or not self.moments.count:
            counted = scores if all_scores is None else all_scores
            self.moments.update(counted)
            own = counted.abs().max().item() if counted.numel() else 0.0
            self._largest = max(self._largest, largest, own)
        return scores / self.divisor

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self.moments.state_dict() | {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.moments.load_state_dict(state)
        self._largest = float(state.get("largest", 0.0))  # absent in older checkpoints


class RunningMoments:
    """Count, mean and variance of all values seen, in float64.

    Batches are merged as in Chan, Golub & LeVeque (1979): without cancellation, and up to rounding
    independent of how the values were divided into batches.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation (over count - 1); 0 if unknown."""
        return math.sqrt(max(self._squares, 0.0) / max(self.count - 1, 1))

    @property
    def std(self) -> float:
        """Standard deviation (over count - 1); 1 if unknown or 0, so that dividing is safe."""
        return self.spread or 1.0

    def update(self, values: Tensor) -> None:
        """Add `values` (of any shape, from all ranks)."""
        values = values.detach().double().flatten()
        if not values.numel():
            return
        mean = values.mean()
        self.merge(values.numel(), mean.item(), (values - mean).square().sum().item())

    def merge(self, count: int, mean: float, squared_distances: float) -> None:
        """Add other values by their moments.

        Args:
            count: number of values.
            mean: their mean.
            squared_distances: sum of their squared distances from their mean.
        """
        if not count:
            return
        total = self.count + count
        distance = mean - self.mean
        self.mean += distance * count / total
        self._squares += squared_distances + distance * distance * self.count * count / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._squares = float(state["squares"])


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    beta: float,
    estimator: KlEstimatorName = "k1",
) -> Tensor:
    """Return rewards [B, T]: -beta KL on every response token, and the score on the last of them.

    Args:
        scores: [B] of whole responses, scaled.
        logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
        mask: [B, T] bool, True on response tokens. A row without any gets no reward.
        beta: weight of the KL penalty; 0 where it is in the loss.
        estimator: of KL, k1, k2 or k3.
    """
    mask = mask.bool()
    penalty = ESTIMATORS[estimator](logprobs, ref_logprobs)
    rewards = (-beta * penalty).float().masked_fill(~mask, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last_column = (columns * mask).amax(dim=1, keepdim=True)
    # The score of a row without tokens is undefined and may be NaN.
    score = scores.float().unsqueeze(1).masked_fill(~mask.any(dim=1, keepdim=True), 0.0)
    return rewards.scatter_add(1, last_column, score)


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
        gamma: discount per token.
        lam: lambda of GAE: 0 is the one-step TD error, 1 the Monte Carlo return less the value.
    """
    outside = ~mask.bool()
    rewards = rewards.float().masked_fill(outside, 0.0)
    values = values.float().masked_fill(outside, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    # Outside the mask rewards and values are 0, hence so are the advantages: nothing to reset.
    for t in range(values.shape[1] - 1, -1, -1):
        td_error = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = td_error + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


@torch.no_grad()
def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the discounted sum [B, T] of each token's reward and all later ones (Hu et al. 2025).

    It is `gae` with lambda 1 and no values.

    Args:
        rewards: [B, T] per token.
        mask: [B, T] bool, True on the first L columns of each row.
        gamma: discount per token.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def leave_one_out(rewards: Tensor, size: int) -> Tensor:
    """Return each response's reward less the mean of the others' [N] (Ahmadian et al. 2024, eq. 6).

    The baseline does not depend on the response itself, so the gradient stays unbiased.

    Args:
        rewards: [N] of whole responses, groups one after the other.
        size: k, at least 2.
    """
    assert size >= 2, f"groups of {size} have no others to compare with"
    groups = rewards.view(-1, size)
    others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
    return (groups - others).flatten()


GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL: rewards that differ by rounding stay small."""


def group_relative(rewards: Tensor, size: int, divide: bool) -> Tensor:
    """Return each response's reward relative to its group [N] (GRPO, Shao et al. 2024, 4.1.2).

    Args:
        rewards: [N] of whole responses, groups one after the other.
        size: k, at least 2.
        divide: whether by the group's standard deviation (over k - 1); without it, prompts whose
            rewards differ little weigh less (Liu et al. 2025).
    """
    assert size >= 2, f"groups of {size} have no others to compare with"
    groups = rewards.view(-1, size)
    relative = groups - groups.mean(1, keepdim=True)
    if divide:
        relative = relative / (groups.std(1, keepdim=True) + GROUP_EPSILON)
    return relative.flatten()


@torch.no_grad()
def whiten(
    values: Tensor,
    mask: Tensor,
    mean: Tensor | float | None = None,
    std: Tensor | float | None = None,
) -> Tensor:
    """Return (x - mean) / std inside the mask [B, T], and 0 outside.

    The variance is the biased one, divided by the number of tokens: the result has mean 0 and mean
    square 1, unless the values differ by rounding alone: that is not magnified.

    Args:
        values: [B, T].
        mask: [B, T] bool.
        mean: over the tokens of all ranks; of `values` inside the mask if None.
        std: over the tokens of all ranks, given together with `mean`.
    """
    assert (mean is None) == (std is None), "mean and std go together"
    if mean is None or std is None:
        mean, std = masked_mean(values, mask), masked_var(values, mask).sqrt()
    floor = ROUNDING * torch.as_tensor(mean).abs()
    std = torch.maximum(torch.as_tensor(std), floor) + WHITEN_EPSILON
    return ((values - mean) / std).masked_fill(~mask.bool(), 0.0)
