"""From logits and a uniform number to a token.

Dimensions: A rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens [A] and their log-probabilities [A] under softmax(logits).

    A token is drawn by the inverse of the cumulative distribution: it is the first whose cumulated
    probability exceeds the uniform number. A token of probability 0 is never drawn.

    Args:
        logits: [A, V] float32, divided by the temperature; overwritten.
        uniforms: [A] float64 in [0, 1), or None to take the most probable token.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    shifted = logits.sub_(peak)
    weights = shifted.exp()
    if uniforms is None:
        token = shifted.argmax(dim=-1, keepdim=True)
        total = weights.sum(dim=-1, keepdim=True)
    else:
        cumulated = weights.cumsum(dim=-1)
        total = cumulated[:, -1:]
        threshold = (uniforms.unsqueeze(1) * total).to(total.dtype)
        # Rounded up to the total, it would be exceeded by no token.
        threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulated, threshold, right=True)
        # Logits that are not numbers end here; the index must stay valid for the next forward.
        token = token.clamp_max_(logits.shape[1] - 1)
    logprob = shifted.gather(1, token) - total.log()
    return token.squeeze(1), logprob.squeeze(1)
