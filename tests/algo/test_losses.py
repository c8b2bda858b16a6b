"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_exp.algo.losses import (
    PolicyStats,
    dpo_loss,
    entropy_bonus,
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


CHOSEN, REJECTED = torch.tensor([2.0, -1.0, math.nan]), torch.tensor([-1.0, 1.0, 0.0])
# Margins 3 and -2; the third pair only fills up the batch.
PAIRS = torch.tensor([1.0, 1.0, 0.0])


def test_dpo_by_hand() -> None:
    loss, stats = dpo_loss(CHOSEN, REJECTED, PAIRS, 2.0, 0.5, "sigmoid")
    # -ln sigmoid(x) = ln(1 + e^-x) at x = 0.5 * 3 and 0.5 * -2.
    expected = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.0))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert (stats.correct.item(), stats.count.item()) == (1.0, 2.0)
    assert (stats.chosen.item(), stats.rejected.item()) == (0.5, 0.0)


def test_dpo_with_label_smoothing_by_hand() -> None:
    loss, _ = dpo_loss(CHOSEN, REJECTED, PAIRS, 2.0, 0.5, "sigmoid", label_smoothing=0.1)
    right = math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.0))
    wrong = math.log1p(math.exp(1.5)) + math.log1p(math.exp(-1.0))
    assert loss.item() == pytest.approx((0.9 * right + 0.1 * wrong) / 2, rel=1e-6)


def test_ipo_and_hinge_by_hand() -> None:
    ipo, _ = dpo_loss(CHOSEN, REJECTED, PAIRS, 2.0, 0.5, "ipo")
    assert ipo.item() == pytest.approx(((3 - 1) ** 2 + (-2 - 1) ** 2) / 2)  # 1 / (2 * 0.5) = 1
    hinge, _ = dpo_loss(CHOSEN, REJECTED, PAIRS, 2.0, 0.5, "hinge")
    assert hinge.item() == pytest.approx((0 + (1 + 1)) / 2)  # 1 - 1.5 is below 0, 1 + 1 above


def test_dpo_pushes_apart_what_it_has_the_wrong_way_round() -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(True), REJECTED.clone().requires_grad_(True)
    loss, _ = dpo_loss(chosen, rejected, PAIRS, 2.0, 0.5, "sigmoid")
    loss.backward()
    # d/dx -ln sigmoid(beta x) = -beta sigmoid(-beta x), divided by 2 pairs.
    slopes = [0.25 / (1 + math.exp(1.5)), 0.25 / (1 + math.exp(-1.0)), 0.0]
    torch.testing.assert_close(chosen.grad, -torch.tensor(slopes))
    torch.testing.assert_close(rejected.grad, torch.tensor(slopes))
