"""Importance weights: responses of one sampler train a policy whose probabilities are others.

A sampler mu that is not quite the policy pi that is trained (another number format or library, or
the weights of one iteration before) gives samples whose expectations are those of mu. Weighting
each token's advantage by pi / mu makes them those of pi; cutting the weight at C bounds its
variance, at the price of a small bias (Ionides 2008, truncated importance sampling).

B rows, T response tokens. The gap of a token is log pi - log mu, in nats.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_exp.algo.kl import k3


def importance_gap(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the gap log pi - log mu [B, T] float32, 0 outside of the mask.

    Args:
        logprobs: [B, T] under the policy that is trained, before its first update.
        sampler_logprobs: [B, T] as the sampler says them, of the distribution it drew from.
        mask: [B, T] bool, True on response tokens.
    """
    return (logprobs.float() - sampler_logprobs.float()).masked_fill(~mask, 0.0)


def truncated_weights(gap: Tensor, limit: float) -> Tensor:
    """Return min(C, pi / mu) [B, T].

    Args:
        gap: [B, T], in nats.
        limit: C, at least 1: below, all tokens of equal probability would be scaled down.
    """
    assert limit >= 1.0, f"limit {limit} is below 1"
    return gap.exp().clamp(max=limit)


def sampler_kl(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return k3 of the sampler to the policy [B, T], whose mean over tokens estimates KL(mu || pi).

    With the gap g it is exp(g) - 1 - g: never negative, as the tokens are the sampler's. The
    arguments are those of `importance_gap`.
    """
    return k3(sampler_logprobs.float(), logprobs.float()).masked_fill(~mask, 0.0)


def effective_share(weights_sum: Tensor, squares_sum: Tensor, count: Tensor) -> Tensor:
    """Return the effective sample size as a share of the sample (0-dim, Kish 1965).

    It is (sum w)^2 / (n sum w^2): 1 where all weights are equal, 1/n where one has all the weight.

    Args:
        weights_sum: 0-dim, sum of the weights.
        squares_sum: 0-dim, sum of their squares.
        count: 0-dim, n.
    """
    return weights_sum.square() / (count * squares_sum)
