"""From logits and a uniform number to a token.

Dimensions: A rows, V vocabulary.

Uniform numbers that are a function of (seed, rollout, position) and of nothing else.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) is a hash of a counter under a key: there is no
state to keep, restore or share, and neither ranks nor batches nor their order change a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_UNIFORM = 1.0 - 2.0**-23
"""Times a total of about 1, rounded to float32, it stays below the total: some token exceeds it."""

MOST_LIKELY = (256, 4096)
"""How many of the most probable tokens a nucleus is looked for in, before all of them."""


def draw(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens [A] and their log-probabilities [A] under softmax(logits).

    A token is drawn by the inverse of the cumulative distribution: it is the first whose cumulated
    probability exceeds the uniform number. A token of probability 0 is never drawn.

    Args:
        logits: [A, V] float32, divided by the temperature.
        uniforms: [A] float32 from `usable`, or None to take the most probable token.
    """
    probabilities = torch.softmax(logits, dim=-1)
    if uniforms is None:
        token = probabilities.argmax(dim=-1, keepdim=True)
    else:
        cumulated = probabilities.cumsum(dim=-1)
        threshold = uniforms.unsqueeze(1) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, threshold, right=True)
        # Logits that are not numbers end here; the index must stay valid for the next forward.
        token.clamp_(max=logits.shape[1] - 1)
    return token.squeeze(1), probabilities.gather(1, token).log_().squeeze(1)


def truncated(logits: Tensor, top_p: float, top_k: int) -> Tensor:
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
        # A CPU sorts slowly, and a nucleus is small; elsewhere asking whether it is takes longer.
        sizes = [*(size for size in MOST_LIKELY if size < vocabulary), vocabulary]
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


def _nucleus(values: Tensor, all_of: Tensor, top_p: float) -> Tensor:
    """Return how many of the falling logits [A, K] make up the nucleus: [A, 1], at least 1.

    Args:
        values: the highest of the logits.
        all_of: [A, N] the logits whose probabilities add up to 1.
        top_p: see `truncated`.
    """
    probabilities = (values - all_of.logsumexp(dim=-1, keepdim=True)).exp()
    # What the more probable tokens add up to.
    before = probabilities.cumsum(dim=-1) - probabilities
    inside = (before < top_p) | (top_p == 1.0)
    return inside.sum(dim=-1, keepdim=True).clamp(min=1)


def usable(uniforms: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1) as float32 numbers that `draw` can take."""
    return uniforms.clamp(max=LARGEST_UNIFORM).float()


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
