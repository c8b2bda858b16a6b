"""A reward that can be counted: the share of a response's tokens in the vocabulary's first quarter.

A random policy starts at 0.25 of `SCALE` and anything that learns goes up, so two trainers can be
compared by their reward after equal samples. Both sides score with this one function.

Dimensions: B rows, S tokens of prompt and response.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 10.0  # a share of 1 scores 10, the size of reward that a KL coefficient of 0.05 suits


def counted_share(tokens: Tensor, prompt_tokens: int, vocabulary: int) -> Tensor:
    """Return each row's score after each of its tokens.

    Args:
        tokens: [B, S] int64, every prompt `prompt_tokens` long and no padding.
        prompt_tokens: length of the prompts, which do not count.
        vocabulary: size of the vocabulary.

    Returns:
        [B, S] float32; the last column is the score of the whole response.
    """
    counts = tokens < vocabulary // 4
    counts[:, :prompt_tokens] = False
    length = max(tokens.shape[1] - prompt_tokens, 1)
    return counts.to(torch.float32).cumsum(1) * (SCALE / length)
