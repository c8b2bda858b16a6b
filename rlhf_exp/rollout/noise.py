"""Uniform numbers that are a function of (seed, rollout, position) and of nothing else.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) is a hash of a counter under a key: there is no
state to keep, restore or share, and neither ranks nor batches nor their order change a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def uniform(seed: int, rollout: Tensor, position: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1) with 53 random bits, on the tensors' device.

    Args:
        seed: the run's seed, at least 0 and below 2^64: the key.
        rollout: int64, at least 0; broadcast with `position`. Words 2 and 3 of the counter.
        position: int64, at least 0 and below 2^32: the token's number within its response. Word 0.
    """
    assert 0 <= seed < 1 << 64, f"seed {seed} is not between 0 and 2^64"
    rollout, position = torch.broadcast_tensors(rollout, position)
    counter = (position & _WORD, torch.zeros_like(position), rollout & _WORD, rollout >> 32)
    first, second, _, _ = philox4x32(counter, (seed & _WORD, seed >> 32))
    return ((first >> 5) * (1 << 26) + (second >> 6)).double() / (1 << 53)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words that Philox4x32-10 makes of a counter under a key.

    Args:
        counter: four int64 tensors of one shape, each word below 2^32.
        key: two words below 2^32.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(word0, _MULTIPLIERS[0])
        high1, low1 = _multiply(word2, _MULTIPLIERS[1])
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return word0, word1, word2, word3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of the 64-bit product, which int64 holds modulo 2^64."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
