"""Value head: a number for each state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

INITIAL_STD = 0.01


class ValueHead(nn.Module):
    """A linear layer D -> 1 that computes in float32 whatever the model's precision."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, generator=generator) * INITIAL_STD)
        self.bias = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def copy_from(self, weight: Tensor, offset: float) -> None:
        """Start as a reward head: `weight` [1, D] or [D], and `offset` added to the product."""
        self.weight.copy_(weight.reshape(-1))
        self.bias.fill_(offset)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [...] float32 of `hidden` [..., D]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.float() + self.bias.float()
