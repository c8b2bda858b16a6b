"""KL divergence of policy and reference: estimators, their loss, controllers of its weight.

Dimensions: B rows, T response tokens.

The estimators are Schulman's (http://joschu.net/blog/kl-approx.html), for tokens sampled from the
policy: with d = log pi - log ref, both k1 = d and k3 = exp(-d) - 1 + d estimate KL(pi || ref)
without bias. k2 = d^2 / 2 is biased, but small where d is small, and never negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlhf_exp.algo.masks import masked_sum

ADAPTIVE_STEP_LIMIT = 0.2


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log pi - log ref [B, T], unbiased and of either sign; the reward's penalty uses it.

    Args:
        logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d [B, T], d = log pi - log ref: unbiased, never negative.

    Args:
        logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
    """
    difference = logprobs - ref_logprobs
    return torch.expm1(-difference) + difference


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d^2 / 2 [B, T], d = log pi - log ref: biased, of low variance, never negative.

    Args:
        logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


Estimator = Callable[[Tensor, Tensor], Tensor]
KlEstimatorName = Literal["k1", "k2", "k3"]
ESTIMATORS: dict[KlEstimatorName, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of k1 over each response [B], in nats.

    Args:
        logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
        mask: [B, T] bool, True on response tokens.
    """
    return k1(logprobs, ref_logprobs).masked_fill(~mask.bool(), 0.0).sum(1)


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    normaliser: Tensor | float,
    estimator: KlEstimatorName,
    unbiased: bool,
) -> Tensor:
    """Return the estimated KL(pi || ref) (0-dim) as a term of the loss; add it times beta.

    The gradient of an estimator's value is not the gradient of the divergence: that of k1 is 0 on
    average, and that of k3 belongs to KL(ref || pi). What they leave out is that the policy also
    chooses which tokens are sampled. With `unbiased`, k1 and k3 are weighted by the probability
    ratio rho = pi / pi_old, with its gradient: E_old[rho k(d)] = E_pi[k(d)] = KL for every pi, so
    the gradients are equal too. k2's own gradient, d grad log pi, is that of the divergence
    already; it is weighted by rho without its gradient, for the tokens that the old policy chose.

    Args:
        logprobs: [B, T] under the policy being trained.
        old_logprobs: [B, T] under the policy that sampled.
        ref_logprobs: [B, T] under the reference policy.
        mask: [B, T] bool or weights.
        normaliser: sum of the weights of the global minibatch.
        estimator: k1, k2 or k3.
        unbiased: whether the gradient is that of the divergence; else that of the estimator alone,
            as in GRPO (Shao et al. 2024, eqs. 3 and 4).
    """
    outside = mask == 0
    logprobs, old_logprobs, ref_logprobs = (
        tensor.float().masked_fill(outside, 0.0)
        for tensor in (logprobs, old_logprobs, ref_logprobs)
    )
    penalty = ESTIMATORS[estimator](logprobs, ref_logprobs)
    if unbiased:
        ratio = (logprobs - old_logprobs).exp()
        penalty = penalty * (ratio.detach() if estimator == "k2" else ratio)
    return masked_sum(penalty, mask) / normaliser


class KLController(Protocol):
    """Sets the weight of the KL penalty, once per iteration."""

    coef: float

    def update(self, sequence_kl_mean: float, rollouts: int) -> None:
        """Update the weight after an iteration.

        Args:
            sequence_kl_mean: mean of `sequence_kl` over the iteration's responses, of all ranks.
            rollouts: number of these responses.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class FixedKL:
    """A constant weight."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, sequence_kl_mean: float, rollouts: int) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the weight."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the weight of a checkpoint."""
        self.coef = float(state["coef"])


class AdaptiveKL:
    """A weight that steers KL towards a target (Ziegler et al. 2019, section 2.2).

    Args:
        coef: initial weight, per nat.
        target: desired mean of `sequence_kl`, in nats.
        horizon: rollouts over which the weight can change by the factor 1 +- 0.2.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        assert target > 0, f"target {target} is not above 0"
        assert horizon > 0, f"horizon {horizon} is not above 0"
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, sequence_kl_mean: float, rollouts: int) -> None:
        """Multiply the weight by 1 + clip(KL / target - 1, +-0.2) rollouts / horizon."""
        error = sequence_kl_mean / self.target - 1.0
        error = min(max(error, -ADAPTIVE_STEP_LIMIT), ADAPTIVE_STEP_LIMIT)
        self.coef *= 1.0 + error * rollouts / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return the weight; target and horizon belong to the config."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the weight of a checkpoint."""
        self.coef = float(state["coef"])
