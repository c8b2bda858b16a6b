"""Estimators of the divergence, and its control, by hand and by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_exp.algo.kl import (
    AdaptiveKL,
    FixedKL,
    KlEstimatorName,
    k1,
    k3,
    kl_loss,
    sequence_kl,
)


def test_both_estimators_have_the_divergence_as_their_mean() -> None:
    policy = np.array([0.7, 0.2, 0.1])
    reference = np.array([0.1, 0.3, 0.6])
    exact = float((policy * np.log(policy / reference)).sum())
    # Every token weighted by its probability under the policy, which samples it.
    logprobs, ref_logprobs = torch.tensor(np.log([policy, reference]))
    weights = torch.tensor(policy)
    assert (k1(logprobs, ref_logprobs) * weights).sum().item() == pytest.approx(exact)
    assert (k3(logprobs, ref_logprobs) * weights).sum().item() == pytest.approx(exact)


def test_k3_has_the_sign_of_d_right() -> None:
    # d = ln 2: exp(-d) - 1 + d = 0.5 - 1 + 0.6931; turned round it would be 2 - 1 - 0.6931.
    value = k3(torch.tensor([[math.log(2)]]), torch.tensor([[0.0]]))
    assert value.item() == pytest.approx(math.log(2) - 0.5)


def test_k3_is_precise_for_close_policies() -> None:
    # d = 1e-3: d^2/2 - d^3/6 = 4.998e-7. Without expm1 float32 leaves no digit of it.
    value = k3(torch.tensor([1e-3]), torch.tensor([0.0]))
    assert value.item() == pytest.approx(4.998e-7, rel=1e-3)


def test_sequence_kl_sums_the_response_only() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, 5.0, 5.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.5, 0.0], [-0.5, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # 1 - 0.5 and -0.5.
    assert sequence_kl(logprobs, ref_logprobs, mask).tolist() == [0.5, -0.5]


def test_adaptive_weight_by_hand() -> None:
    controller = AdaptiveKL(coef=0.05, target=6.0, horizon=10000)
    controller.update(6.6, rollouts=448)  # error 0.1: factor 1 + 0.1 * 448 / 10000 = 1.00448
    assert controller.coef == pytest.approx(0.05 * 1.00448)
    controller.update(60.0, rollouts=448)  # error 9, cut to 0.2: factor 1.00896
    assert controller.coef == pytest.approx(0.05 * 1.00448 * 1.00896)
    controller.update(0.0, rollouts=448)  # error -1, cut to -0.2: factor 0.99104
    assert controller.coef == pytest.approx(0.05 * 1.00448 * 1.00896 * 0.99104)


def test_state_continues_and_the_fixed_weight_stays() -> None:
    first, second = AdaptiveKL(0.05, 6.0, 100), AdaptiveKL(0.9, 6.0, 100)
    first.update(12.0, 50)  # factor 1 + 0.2 * 50 / 100 = 1.1
    second.load_state_dict(first.state_dict())
    assert second.coef == pytest.approx(0.055)
    fixed = FixedKL(0.1)
    fixed.update(100.0, 100)
    assert fixed.coef == 0.1
    other = FixedKL(0.3)
    other.load_state_dict(fixed.state_dict())
    assert other.coef == 0.1


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
