"""Sampling of tokens from logits, with uniform numbers from a counter-based generator.

A rows, K most probable tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_UNIFORM = 1.0 - 2.0**-23
"""Largest uniform number used: times a total of about 1, rounded to float32, it stays below the
total, so the cumulated probability of some token exceeds it."""

NUCLEUS_SIZES = (256, 4096)
"""Numbers of most probable tokens among which a nucleus is searched, before all of them."""


def draw_tokens(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw tokens [A]; return them and their log-probabilities [A] under softmax(logits).

    A token is drawn by the inverse of the cumulative distribution: it is the first whose cumulated
    probability exceeds the uniform number. A token of probability 0 is never drawn.

    Args:
        logits: [A, V] float32, divided by the temperature.
        uniforms: [A] float32 from `to_float32`, or None for the most probable token.
    """
    probabilities = torch.softmax(logits, dim=-1)
    if uniforms is None:
        token = probabilities.argmax(dim=-1, keepdim=True)
    else:
        cumulated = _cumulated(probabilities)
        threshold = uniforms.unsqueeze(1) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, threshold, right=True)
        # With logits that are NaN the index would be V; it must be valid for the next forward pass.
        token.clamp_(max=logits.shape[1] - 1)
    return token.squeeze(1), probabilities.gather(1, token).log_().squeeze(1)


def _cumulated(probabilities: Tensor) -> Tensor:
    """Return the cumulative sums of each row [A, V]."""
    if len(probabilities) == 1 and probabilities.is_cuda:
        # The kernel for one row adds up in an order that changes from call to call.
        return probabilities.expand(2, -1).cumsum(dim=-1)[:1]
    return probabilities.cumsum(dim=-1)


def truncate_logits(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return logits [A, V] with all but the most probable tokens at minus infinity.

    Of equally probable tokens the one with the lower id goes first. Both limits together: the
    nucleus of the distribution of the k tokens.

    Args:
        logits: [A, V] float32, divided by the temperature.
        top_p: above 0, at most 1: keep the smallest number of most probable tokens whose
            probabilities add up to this or more (the nucleus; Holtzman et al. 2020, section 3.1).
        top_k: keep this many tokens (Fan et al. 2018); 0 for all.
    """
    vocabulary = logits.shape[-1]
    sizes = [min(top_k or vocabulary, vocabulary)]
    if logits.device.type == "cpu" and not top_k:
        # A CPU sorts slowly, and a nucleus is small. On a GPU the check would wait for the device.
        sizes = [*(size for size in NUCLEUS_SIZES if size < vocabulary), vocabulary]
    for size in sizes:
        values = logits.topk(size, dim=-1).values
        count = _nucleus(values, values if top_k else logits, top_p)
        if size == sizes[-1] or bool((count < size).all()):
            break
    last = values.gather(-1, count - 1)
    equal = logits == last
    spare = count - (logits > last).sum(dim=-1, keepdim=True)
    outside = (logits < last) | (equal & (equal.cumsum(dim=-1) > spare))
    return logits.masked_fill(outside, -torch.inf)


def _nucleus(values: Tensor, all_logits: Tensor, top_p: float) -> Tensor:
    """Return the number of tokens in the nucleus, [A, 1], at least 1.

    Args:
        values: [A, K] the highest logits, in descending order.
        all_logits: [A, N] the logits whose probabilities add up to 1.
        top_p: see `truncate_logits`.
    """
    probabilities = (values - all_logits.logsumexp(dim=-1, keepdim=True)).exp()
    # The total probability of the more probable tokens.
    before = probabilities.cumsum(dim=-1) - probabilities
    inside = (before < top_p) | (top_p == 1.0)
    return inside.sum(dim=-1, keepdim=True).clamp(min=1)


def to_float32(uniforms: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1) as float32, at most `LARGEST_UNIFORM`."""
    return uniforms.clamp(max=LARGEST_UNIFORM).float()


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD_MASK = 0xFFFFFFFF
_ROUNDS = 10


def uniform(seed: int, rollout: Tensor, position: Tensor) -> Tensor:
    """Return uniform float64 numbers in [0, 1) with 53 random bits, on the tensors' device.

    They are a function of (seed, rollout, position) and of nothing else: there is no generator
    state to keep, restore or share, and neither ranks nor batches nor their order change a number.

    Args:
        seed: the run's seed, at least 0 and below 2^64: the key of Philox.
        rollout: int64, at least 0; broadcast with `position`. Words 2 and 3 of
            the counter.
        position: int64, at least 0 and below 2^32: the token's number within its response. Word 0.
    """
    assert 0 <= seed < 1 << 64, f"seed {seed} is not between 0 and 2^64"
    rollout, position = torch.broadcast_tensors(rollout, position)
    counter = (
        position & _WORD_MASK,
        torch.zeros_like(position),
        rollout & _WORD_MASK,
        rollout >> 32,
    )
    first, second, _, _ = philox4x32(counter, (seed & _WORD_MASK, seed >> 32))
    return ((first >> 5) * (1 << 26) + (second >> 6)).double() / (1 << 53)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011): a hash of a counter under a key.

    Args:
        counter: four int64 tensors of one shape, each word below 2^32.
        key: two words below 2^32.

    Returns:
        Four words of the counter's shape.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(word0, _MULTIPLIERS[0])
        high1, low1 = _multiply(word2, _MULTIPLIERS[1])
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD_MASK, (key1 + _WEYL[1]) & _WORD_MASK
    return word0, word1, word2, word3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of the 64-bit product, which int64 holds modulo 2^64."""
    product = word * multiplier
    return (product >> 32) & _WORD_MASK, product & _WORD_MASK
