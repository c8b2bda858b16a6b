"""From logits and a uniform number to a token.

Dimensions: A rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_UNIFORM = 1.0 - 2.0**-23
"""Times a total of about 1, rounded to float32, it stays below the total: some token exceeds it."""


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


def usable(uniforms: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1) as float32 numbers that `draw` can take."""
    return uniforms.clamp(max=LARGEST_UNIFORM).float()
