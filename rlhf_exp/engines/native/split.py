"""Cutting batches into micro-batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def by_length(lengths: Tensor, rows: int | None) -> Iterator[Tensor]:
    """Yield the numbers of the rows of each micro-batch, longest rows first.

    A micro-batch costs as much as its longest row, so rows of like length go together; the largest
    comes first, so that what does not fit into memory fails at once.

    Args:
        lengths: [B] int64.
        rows: Rows of a micro-batch; `None`: all in one.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    yield from order.split(rows or max(len(order), 1))
