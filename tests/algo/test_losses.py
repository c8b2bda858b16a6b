"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_exp.algo.kl import KlEstimatorName
from rlhf_exp.algo.losses import (
    PolicyStats,
    entropy_bonus,
    kl_loss,
    language_model_loss,
    pairwise_loss,
    policy_loss,
    value_loss,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def policy_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ratios 1.5, 0.5, 1.1 and 0.5; what is masked out would poison any sum."""
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, math.nan, -1e9]])
    ratio = torch.tensor([[1.5, 0.5, 1.1], [0.5, 1.0, 1.0]])
    new = (old + ratio.log()).masked_fill(~MASK, 50.0).requires_grad_()
    advantages = torch.tensor([[2.0, 1.0, -1.0], [-3.0, math.inf, 7.0]])
    return new, old, advantages


def test_policy_loss_by_hand() -> None:
    new, old, advantages = policy_problem()
    loss, stats = policy_loss(new, old, advantages, MASK, 0.2, normaliser=10.0)
    # A r: max(-A r, -A clip(r, 0.8, 1.2)) for each of the four tokens:
    #   A = 2,  r = 1.5: max(-3.0, -2.4) = -2.4   clipped
    #   A = 1,  r = 0.5: max(-0.5, -0.8) = -0.5
    #   A = -1, r = 1.1: max(1.1, 1.1)   =  1.1
    #   A = -3, r = 0.5: max(1.5, 2.4)   =  2.4   clipped
    assert loss.item() == pytest.approx((-2.4 - 0.5 + 1.1 + 2.4) / 10, rel=1e-5)
    assert stats.clipped.item() == 2.0
    assert stats.count.item() == 4.0
    assert stats.ratio_max.item() == pytest.approx(1.5)
    # r - 1 - ln r: 0.5 - ln 1.5, -0.5 + ln 2 (twice), 0.1 - ln 1.1.
    expected = (0.5 - math.log(1.5)) + 2 * (math.log(2) - 0.5) + (0.1 - math.log(1.1))
    assert stats.approx_kl.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    # d(-A r)/d log pi = -A r where it is not clipped, 0 where it is and outside the mask.
    expected_gradient = torch.tensor([[0.0, -0.5, 1.1], [0.0, 0.0, 0.0]]) / 10
    torch.testing.assert_close(new.grad, expected_gradient)


def test_policy_loss_at_the_first_minibatch() -> None:
    _, old, advantages = policy_problem()
    _, stats = policy_loss(old.clone(), old, advantages, MASK, 0.2, normaliser=4.0)
    assert stats.ratio_max.item() == 1.0
    assert stats.clipped.item() == 0.0
    assert stats.approx_kl.item() == 0.0


def test_accumulation_changes_neither_loss_nor_statistics() -> None:
    new, old, advantages = policy_problem()
    whole, stats = policy_loss(new, old, advantages, MASK, 0.2, normaliser=4.0)
    parts = [
        policy_loss(new[row], old[row], advantages[row], MASK[row], 0.2, normaliser=4.0)
        for row in (slice(0, 1), slice(1, 2))
    ]
    assert (parts[0][0] + parts[1][0]).item() == pytest.approx(whole.item())
    joined = parts[0][1] + parts[1][1]
    assert isinstance(joined, PolicyStats)
    # Sums add up (2 clipped of 4), the largest ratio is the larger one and not 1.5 + 0.5.
    assert (joined.clipped.item(), joined.count.item()) == (2.0, 4.0)
    assert joined.ratio_max.item() == pytest.approx(1.5)
    assert joined.approx_kl.item() == pytest.approx(stats.approx_kl.item())


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 0.1], [3.0, 9.0, math.nan]], requires_grad=True)
    old = torch.tensor([[0.5, 1.9, 0.0], [0.0, math.inf, 0.0]])
    returns = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss, stats = value_loss(values, old, returns, MASK, 0.2, normaliser=10.0)
    #   V = 1,   Vclip = 0.7, R = 2: max(1, 1.69)    = 1.69  clipped
    #   V = 2,   Vclip = 2,   R = 1: max(1, 1)       = 1
    #   V = 0.1, Vclip = 0.1, R = 1: max(0.81, 0.81) = 0.81
    #   V = 3,   Vclip = 0.2, R = 1: max(4, 0.64)    = 4
    assert loss.item() == pytest.approx(0.5 * (1.69 + 1 + 0.81 + 4) / 10)
    assert stats.clipped.item() == 1.0
    assert stats.count.item() == 4.0
    assert stats.squared_error.item() == pytest.approx(1 + 1 + 0.81 + 4)
    loss.backward()
    # d/dV 0.5 (V - R)^2 = V - R; 0 where clipped. (Where both are equal either may be taken, and
    # both have this slope.)
    expected = torch.tensor([[0.0, 1.0, -0.9], [2.0, 0.0, 0.0]]) / 10
    torch.testing.assert_close(values.grad, expected)


def test_values_within_the_range_are_not_clipped_by_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 1000, generator=generator)
    values = old + 0.19 * (2 * torch.rand(1, 1000, generator=generator) - 1)
    returns = torch.randn(1, 1000, generator=generator)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    loss, stats = value_loss(values, old, returns, mask, 0.2, normaliser=1000.0)
    assert stats.clipped.item() == 0.0
    assert loss.item() == pytest.approx(0.5 * (values - returns).square().mean().item())
    # A tie beyond the range: V = 1.5 and Vclip = 0.5 are equally far from R = 1.
    tie = [torch.tensor([[number]]) for number in (1.5, 0.0, 1.0)]
    assert value_loss(*tie, torch.tensor([[True]]), 0.5, 1.0)[1].clipped.item() == 0.0


def test_pairwise_loss_by_hand() -> None:
    chosen = torch.tensor([2.0, 0.0, 1.0, 5.0])
    rejected = torch.tensor([1.0, 3.0, 1.0, math.nan])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, stats = pairwise_loss(chosen, rejected, weights, normaliser=3.0)
    # -ln sigmoid(x) = ln(1 + e^-x) at x = 1, -3, 0; the last pair only fills up the batch.
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(3)) + math.log(2)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert stats.correct.item() == 1.5  # one right, one wrong, one tie
    assert stats.count.item() == 3.0


def test_language_model_loss_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -math.inf])
    loss = language_model_loss(logprobs, torch.tensor([True, True, False]), normaliser=4.0)
    assert loss.item() == 0.75  # (1 + 2) / 4


def test_entropy_bonus_by_hand() -> None:
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert entropy_bonus(entropy, MASK, normaliser=5.0).item() == 2.0  # (1 + 2 + 3 + 4) / 5


def test_kl_loss_by_hand() -> None:
    new = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, math.nan]])
    old = torch.tensor([[-1.0, -1.0, 0.0], [-3.0, 0.0, math.inf]])
    ref = torch.tensor([[-2.0, -1.0, 0.0], [-3.0, 0.0, math.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # d = 1, -1, 0. k3 = exp(-d) - 1 + d = exp(-1), e - 2, 0; rho = 1, exp(-1), 1.
    plain = kl_loss(new, old, ref, mask, 4.0, "k3", unbiased=False)
    assert plain.item() == pytest.approx((math.exp(-1) + math.e - 2) / 4)
    weighted = kl_loss(new, old, ref, mask, 4.0, "k3", unbiased=True)
    assert weighted.item() == pytest.approx((math.exp(-1) + math.exp(-1) * (math.e - 2)) / 4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_loss_has_the_gradient_of_the_divergence(estimator: KlEstimatorName) -> None:
    """Averaged over all tokens that another policy might have sampled: no noise, no tolerance."""
    scores = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    ref = torch.tensor([1.0, 0.0, -0.5, 0.2], dtype=torch.float64).log_softmax(0)
    old = torch.tensor([0.0, 0.1, 0.9, 1.0], dtype=torch.float64).log_softmax(0)
    new = scores.clone().requires_grad_(True)
    divergence = (new.softmax(0) * (new.log_softmax(0) - ref)).sum()
    (expected,) = torch.autograd.grad(divergence, new)
    tried = scores.clone().requires_grad_(True)
    every = torch.ones(4, 1, dtype=torch.bool)
    columns = (tried.log_softmax(0)[:, None], old[:, None], ref[:, None])
    # One row for each token, weighted by how often the old policy samples it.
    loss = kl_loss(*columns, every * old.exp()[:, None], 1.0, estimator, unbiased=True)
    (found,) = torch.autograd.grad(loss, tried)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_k3_alone_has_another_gradient() -> None:
    """It is that of KL(ref || pi) where the tokens are the policy's own: pi - ref."""
    scores = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([1.0, 0.0, -0.5, 0.2], dtype=torch.float64).log_softmax(0)
    own = scores.log_softmax(0)
    columns = (own[:, None], own.detach()[:, None], ref[:, None])
    loss = kl_loss(*columns, own.detach().exp()[:, None], 1.0, "k3", unbiased=False)
    (found,) = torch.autograd.grad(loss, scores)
    expected = scores.detach().softmax(0) - ref.exp()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
