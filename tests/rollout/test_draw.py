"""Drawing a token, by hand and by frequency."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_exp.rollout.draw import draw, usable


def uniforms(*numbers: float) -> torch.Tensor:
    return usable(torch.tensor(numbers, dtype=torch.float64))


def test_inverse_of_the_cumulative_distribution_by_hand() -> None:
    # Weights 1, 2, 5 of 8: cumulated 0.125, 0.375, 1. Adding 100 to the logits changes nothing.
    logits = torch.log(torch.tensor([1.0, 2.0, 5.0])).add(100.0).expand(6, 3).clone()
    tokens, logprobs = draw(logits, uniforms(0.0, 0.12, 0.13, 0.37, 0.38, 1 - 2**-53))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [math.log(weight / 8) for weight in (1, 1, 2, 2, 5, 5)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def test_impossible_tokens_are_never_drawn() -> None:
    infinite = -math.inf
    logits = torch.tensor([[infinite, 0.0, infinite, 0.0, infinite]]).expand(4, 5).clone()
    tokens, _ = draw(logits, uniforms(0.0, 0.4999999, 0.5, 1 - 2**-53))
    assert tokens.tolist() == [1, 1, 3, 3]


def test_the_largest_number_stays_below_a_total_that_was_rounded_up() -> None:
    # 4096 equal tokens and one impossible: whatever the sum rounds to, the last one is not drawn.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1, 4096, generator=generator)
        logits[0, -1] = -math.inf
        tokens, logprobs = draw(logits, uniforms(1 - 2**-53))
        assert tokens.item() < 4095
        assert torch.isfinite(logprobs).all()


def test_frequencies_are_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    count = 20000
    tokens, _ = draw(
        torch.from_numpy(logits).expand(count, 20).clone(),
        usable(torch.from_numpy(generator.random(count))),
    )
    expected = probabilities * count
    chi_squared = ((np.bincount(tokens, minlength=20) - expected) ** 2 / expected).sum()
    assert chi_squared < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom


def test_greedy() -> None:
    tokens, logprobs = draw(torch.tensor([[0.0, math.log(3.0), 0.0]]), None)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(math.log(3 / 5))


def test_logits_that_are_not_numbers_give_a_valid_token_and_show() -> None:
    tokens, logprobs = draw(torch.full((1, 3), math.nan), uniforms(0.5))
    assert 0 <= tokens.item() < 3
    assert math.isnan(logprobs.item())
