"""The states that enter one decoder block, kept while rows are decoded.

B rows, W columns that a row's tokens come to at most, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.algo.masks import response_mask


class KeptStates:
    """States by row and column of the token that was fed.

    Column W holds the state of the token that closes a row's content, beside what the row said;
    column W + 1 is for what nobody reads.

    Args:
        rows: B.
        width: W.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.closing = width
        self._rows = rows
        self._states: Tensor | None = None

    def put(self, rows: Tensor, columns: Tensor | slice, states: Tensor) -> None:
        """Store `states` [N, D] of `rows` [N] at `columns` [N], or [N, P, D] at a slice of P."""
        if self._states is None:
            shape = (self._rows, self.closing + 2, states.shape[-1])
            # A tensor made in inference mode could not be trained on.
            with torch.inference_mode(False):
                self._states = torch.zeros(shape, dtype=states.dtype, device=states.device)
        self._states[rows, columns] = states

    def of_tokens(self, lengths: Tensor, width: int) -> Tensor | None:
        """Return the states [B, width, D] of the first `lengths` [B] tokens of each row, then 0."""
        if self._states is None:
            return None
        states = self._states[:, :width]
        return states.masked_fill_(~response_mask(lengths, width).unsqueeze(2), 0.0)

    def of_closing(self) -> Tensor | None:
        """Return the states [B, D] of the closing tokens."""
        return None if self._states is None else self._states[:, self.closing].clone()
