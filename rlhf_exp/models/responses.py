"""Where a response's log-probabilities and values are read in a batch of whole sequences.

B rows, S tokens, T response tokens, N response tokens of all rows together, D width. Token t of a
response is predicted by the state at the token before it, position `prompt_length - 1 + t`; the
value estimate of step t is read there too, before the token is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_exp.algo.logprobs import gather_logprobs
from rlhf_exp.models.branch import Branch


@dataclass(frozen=True)
class ResponseIndex:
    """Which states of a batch predict response tokens, and which tokens those are.

    Attributes:
        mask: [B, T] bool, True on response tokens.
        positions: [B, T] int64, of the predicting states in their rows; any beyond a response.
        source: [N] int64, the predicting states in the flattened [B * S], row by row.
        targets: [N] int64, the response tokens.
    """

    mask: Tensor
    positions: Tensor
    source: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        width: int | None = None,
    ) -> ResponseIndex:
        """Index right-padded `tokens` [B, S].

        Args:
            tokens: [B, S] int64.
            prompt_lengths: [B] int64, at least 1.
            response_lengths: [B] int64.
            width: T; the longest response where not given.
        """
        columns = int(response_lengths.max()) if width is None else width
        step = torch.arange(columns, device=tokens.device)
        mask = step < response_lengths[:, None]
        positions = (prompt_lengths[:, None] - 1 + step).clamp(max=tokens.shape[1] - 1)
        start = torch.arange(tokens.shape[0], device=tokens.device) * tokens.shape[1]
        source = (start[:, None] + positions)[mask]
        return cls(mask, positions, source, tokens.reshape(-1).index_select(0, source + 1))

    def pick(self, hidden: Tensor) -> Tensor:
        """Return the predicting states [N, D] of `hidden` [B, S, D]."""
        return hidden.flatten(0, 1).index_select(0, self.source)

    def of_branch(self, branch: Branch, states: Tensor, whole: bool) -> Tensor:
        """Return the predicting states [N, D] at the end of `branch` over `states` [B, S, D].

        Args:
            branch: the top blocks.
            states: entering them.
            whole: whether all blocks must be run at all positions.
        """
        if whole or not branch.reads:
            return self.pick(branch(states))
        return branch.read(states, self.positions)[self.mask]

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` [N] as [B, T], 0 beyond each response's end."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def head_logprobs(
    picked: Tensor,
    head: nn.Linear,
    index: ResponseIndex,
    temperature: float,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (and entropies) [B, T] float32 from `picked` states [N, D]."""
    logprobs, entropy = gather_logprobs(
        picked, head.weight, head.bias, index.targets, temperature, with_entropy=with_entropy
    )
    return index.spread(logprobs), None if entropy is None else index.spread(entropy)
