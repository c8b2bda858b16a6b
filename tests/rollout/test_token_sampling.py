"""Drawing a token, by hand and by frequency.

Philox against its authors' published vectors, and the uniforms made of it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf_exp.rollout.token_sampling import (
    draw_tokens,
    philox4x32,
    to_float32,
    truncate_logits,
    uniform,
)


def uniforms(*numbers: float) -> torch.Tensor:
    return to_float32(torch.tensor(numbers, dtype=torch.float64))


def test_inverse_of_the_cumulative_distribution_by_hand() -> None:
    # Weights 1, 2, 5 of 8: cumulated 0.125, 0.375, 1. Adding 100 to the logits changes nothing.
    logits = torch.log(torch.tensor([1.0, 2.0, 5.0])).add(100.0).expand(6, 3).clone()
    tokens, logprobs = draw_tokens(logits, uniforms(0.0, 0.12, 0.13, 0.37, 0.38, 1 - 2**-53))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [math.log(weight / 8) for weight in (1, 1, 2, 2, 5, 5)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def test_impossible_tokens_are_never_drawn() -> None:
    infinite = -math.inf
    logits = torch.tensor([[infinite, 0.0, infinite, 0.0, infinite]]).expand(4, 5).clone()
    tokens, _ = draw_tokens(logits, uniforms(0.0, 0.4999999, 0.5, 1 - 2**-53))
    assert tokens.tolist() == [1, 1, 3, 3]


def test_the_largest_number_stays_below_a_total_that_was_rounded_up() -> None:
    # 4096 equal tokens and one impossible: whatever the sum rounds to, the last one is not drawn.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1, 4096, generator=generator)
        logits[0, -1] = -math.inf
        tokens, logprobs = draw_tokens(logits, uniforms(1 - 2**-53))
        assert tokens.item() < 4095
        assert torch.isfinite(logprobs).all()


def test_frequencies_are_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    count = 20000
    tokens, _ = draw_tokens(
        torch.from_numpy(logits).expand(count, 20).clone(),
        to_float32(torch.from_numpy(generator.random(count))),
    )
    expected = probabilities * count
    chi_squared = ((np.bincount(tokens, minlength=20) - expected) ** 2 / expected).sum()
    assert chi_squared < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom


def test_greedy() -> None:
    tokens, logprobs = draw_tokens(torch.tensor([[0.0, math.log(3.0), 0.0]]), None)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(math.log(3 / 5))


def test_logits_that_are_not_numbers_give_a_valid_token_and_show() -> None:
    tokens, logprobs = draw_tokens(torch.full((1, 3), math.nan), uniforms(0.5))
    assert 0 <= tokens.item() < 3
    assert math.isnan(logprobs.item())


# Probabilities 1/8, 4/8, 2/8, 1/8: tokens 1, 2 and, equal, the lower id first, 0 and 3.
EIGHTHS = [math.log(1), math.log(4), math.log(2), math.log(1)]


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3]),
        (0.1, 0, [1]),  # one always stays
        (0.45, 0, [1]),
        (0.55, 0, [1, 2]),
        (0.7, 0, [1, 2]),
        (0.8, 0, [0, 1, 2]),
        (0.9, 0, [0, 1, 2, 3]),
        (1.0, 1, [1]),
        (1.0, 3, [0, 1, 2]),
        (1.0, 9, [0, 1, 2, 3]),
        (0.6, 2, [1]),  # 4/6 of what the two tokens have, where it is 4/8 of everything
        (0.7, 2, [1, 2]),
    ],
)
def test_the_nucleus_and_the_most_probable_by_hand(
    top_p: float, top_k: int, kept: list[int]
) -> None:
    logits = torch.tensor([EIGHTHS]) + 7.0
    found = truncate_logits(logits, top_p, top_k)
    assert torch.isfinite(found[0]).nonzero().flatten().tolist() == kept
    assert torch.equal(found[0, kept], logits[0, kept])


def test_a_cut_distribution_is_scaled_up_and_drawn_by_the_same_rule() -> None:
    # Kept: tokens 1 and 2, 4/6 and 2/6, cumulated in the order of the ids: 0, 0.667, 1.
    logits = truncate_logits(torch.tensor([EIGHTHS]).expand(4, 4).clone(), 0.7, 0)
    tokens, logprobs = draw_tokens(logits, uniforms(0.0, 0.66, 0.67, 1 - 2**-53))
    assert tokens.tolist() == [1, 1, 2, 2]
    expected = [math.log(4 / 6), math.log(4 / 6), math.log(2 / 6), math.log(2 / 6)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [300, 6000])
@pytest.mark.parametrize("spread", [0.1, 3.0])  # flat, so that a nucleus is large, and not
@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.3, 0), (1.0, 17), (0.8, 40), (0.9, 700)])
def test_the_same_tokens_as_transformers_keeps(
    top_p: float, top_k: int, spread: float, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, vocabulary, generator=generator) * spread
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(truncate_logits(logits, top_p, top_k), expected)


def test_no_cut_mends_logits_that_are_not_numbers() -> None:
    tokens, logprobs = draw_tokens(
        truncate_logits(torch.full((1, 3), math.nan), 0.9, 2), uniforms(0.5)
    )
    assert 0 <= tokens.item() < 3
    assert math.isnan(logprobs.item())


def test_of_equal_tokens_the_first_ones_stay() -> None:
    # 2000 equal tokens: 500 of them have a quarter of the probability.
    found = truncate_logits(torch.zeros(2, 2000), 0.2501, 0)
    assert torch.isfinite(found).sum(dim=1).tolist() == [501, 501]
    assert torch.isfinite(found[:, :501]).all()
    assert torch.isfinite(
        truncate_logits(torch.zeros(1, 2000), 1.0, 3)[0]
    ).nonzero().flatten().tolist() == [0, 1, 2]


# Known answers of philox4x32 with 10 rounds from the Random123 distribution:
# counter, key, result.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_known_answers() -> None:
    for counter, key, result in KNOWN_ANSWERS:
        tensors = [torch.tensor([word]) for word in words(counter)]
        key0, key1 = words(key)
        output = philox4x32((tensors[0], tensors[1], tensors[2], tensors[3]), (key0, key1))
        assert [int(word) for word in output] == words(result)


def test_uniform_takes_the_first_53_bits() -> None:
    # Counter and key all zero: words 6627e8d5 and e169c58d; 27 bits of the first, 26 of the second.
    expected = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert uniform(0, torch.tensor(0), torch.tensor(0)).item() == expected


def test_seed_rollout_and_position_go_where_the_docstring_says() -> None:
    # The third known answer needs word 1 to be 0, so the counter is built by hand here.
    seed = (0x299F31D0 << 32) | 0xA4093822
    rollout, position = (0x03707344 << 32) | 0x13198A2E, 0x243F6A88
    zero = torch.tensor(0)
    first, second, _, _ = philox4x32(
        (torch.tensor(position), zero, torch.tensor(0x13198A2E), torch.tensor(0x03707344)),
        (0xA4093822, 0x299F31D0),
    )
    expected = ((int(first) >> 5) * 2**26 + (int(second) >> 6)) / 2**53
    assert uniform(seed, torch.tensor(rollout), torch.tensor(position)).item() == expected


def test_numbers_are_uniform_and_all_different() -> None:
    numbers = uniform(7, torch.arange(500).unsqueeze(1), torch.arange(64))
    assert numbers.shape == (500, 64)
    assert numbers.unique().numel() == 500 * 64
    # Ten bins of 3200 expected: chi-squared with 9 degrees of freedom is below 27.9 in 99.9 %.
    counts = torch.histc(numbers.float(), bins=10, min=0, max=1)
    assert ((counts - 3200) ** 2 / 3200).sum().item() < 27.9
    # Neighbours are unrelated: correlations have a standard deviation of 1 / sqrt(31500) = 0.0056.
    for shifted in (numbers[1:, :], numbers[:, 1:]):
        fixed = numbers[: shifted.shape[0], : shifted.shape[1]]
        stacked = torch.stack([fixed.flatten(), shifted.flatten()])
        assert abs(torch.corrcoef(stacked)[0, 1].item()) < 4 * 0.0057


def test_a_number_depends_on_nothing_else() -> None:
    whole = uniform(3, torch.arange(10).unsqueeze(1), torch.arange(5))
    alone = uniform(3, torch.tensor([7]), torch.tensor([4]))
    assert alone.item() == whole[7, 4].item()
