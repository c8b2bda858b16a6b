"""Philox against its authors' published vectors, and the uniforms made of it."""

from __future__ import annotations

import torch

from rlhf_exp.rollout.noise import philox4x32, uniform

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
