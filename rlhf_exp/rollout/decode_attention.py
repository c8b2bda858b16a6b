"""Attention of one query a row on a CPU in half precision, as two batched matrix products.

There torch's scaled-dot-product attention is made for many queries: for the one that decoding has
it takes two to five times as long (measured by `benchmarks/ppo.py`'s shapes: 1.5 ms against 0.3 ms
for 64 rows of 4 heads and 104 keys). transformers calls it by name, see `decoding_mode`.

A rows, H heads, Q queries of a row, K keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_exp.rollout.slot_cache import at_query_positions

NAME = "rlhf_exp_single_query"
"""The name by which a config asks for it."""

OTHER_TERMS = ("softcap", "s_aux", "position_bias")
"""What families add to the scores of attention; with one of them torch's own is left to refuse."""


def single_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,  # noqa: ANN401 - the library's signature
) -> tuple[Tensor, None]:
    """Return attention's output [A, Q, H, E], as the library's functions do.

    Args:
        module: the layer.
        query: [A, H, Q, E].
        key: [A, H', K, E], H a multiple of H'; fastest where its memory is contiguous.
        value: likewise.
        attention_mask: [A, 1, Q, K] bool, True where a query attends, or None.
        dropout: a probability; 0 while sampling.
        scaling: factor of the scores; None: one over the root of E.
        others: the library's further arguments.
    """
    rows, heads, queries, width = query.shape
    if queries > 1 or any(others.get(name) is not None for name in OTHER_TERMS):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    key_heads, columns = key.shape[1:3]
    pairs = rows * key_heads
    grouped = query.reshape(pairs, heads // key_heads, width)
    scores = torch.bmm(grouped, key.reshape(pairs, columns, width).transpose(1, 2))
    # The softmax in float32, as torch's own computes it.
    scores = scores.view(rows, heads, 1, columns).float()
    scores *= width**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    shares = scores.softmax(-1).to(query.dtype).view(pairs, heads // key_heads, columns)
    output = torch.bmm(shares, value.reshape(pairs, columns, width))
    return output.view(rows, 1, heads, width), None


AttentionInterface.register(NAME, single_query_attention)
AttentionMaskInterface.register(NAME, at_query_positions(sdpa_mask))
