"""Attention in half precision on a CPU, as batched matrix products.

torch's own attention for CPUs is made for long sequences in float32. In bfloat16 its backward pass
over 120 tokens takes 2.6 times as long as these products, and one query a row, as in decoding, two
to five times. Scores are rounded to bfloat16 before the softmax, as in transformers' eager
attention: on a pretrained Llama of 260 thousand parameters log-probabilities are as near to those
of float32 as with torch's attention, 0.0098 nats a token in the mean. So this takes the place of
transformers' "sdpa", and leaves to it all else: float32, other devices, long sequences, whatever
adds terms of its own to the scores.

A rows, H heads, Q queries of a row, K keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MOST_KEYS = 384
"""Up to this many keys the products are faster; above, their scores no longer fit the cache."""

OTHER_TERMS = ("softcap", "s_aux", "position_bias")
"""What families add to the scores of attention."""


def half_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,  # noqa: ANN401 - the library's signature
) -> tuple[Tensor, None]:
    """Return attention's output [A, Q, H, E'], as the library's functions do.

    Args:
        module: the layer.
        query: [A, H, Q, E].
        key: [A, H', K, E], H a multiple of H'; fastest where its memory is contiguous.
        value: [A, H', K, E'], likewise; latent attention (DeepSeek, MiniCPM3) has narrower values.
        attention_mask: [A, 1, Q, K] bool, True where a query attends, or None.
        dropout: a probability; with one, torch's own attention is left to apply it.
        scaling: factor of the scores; None: one over the root of E.
        is_causal: whether, without a mask, queries attend to no later keys; None: as the layer.
        others: the library's further arguments.
    """
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    # Without a mask, causal queries are all there are: the first one sees the first key alone.
    clear = attention_mask is not None or queries in (1, keys)
    short = clear and (queries == 1 or keys <= MOST_KEYS)
    plain = dropout == 0.0 and all(others.get(name) is None for name in OTHER_TERMS)
    half = query.device.type == "cpu" and query.dtype.itemsize == 2
    masked = attention_mask is not None and attention_mask.dtype != torch.bool
    if not (short and plain and half) or masked:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    # Heads that share keys stand side by side: their queries are more rows of one product.
    shared = heads // key_heads
    pairs, lines = rows * key_heads, shared * queries
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(
        scaled.reshape(pairs, lines, width), key.reshape(pairs, keys, width).transpose(1, 2)
    ).view(rows, heads, queries, keys)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    allowed = attention_mask
    if allowed is None and causal and queries > 1:
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril_()
    if allowed is not None:
        # Not minus infinity: a query that sees nothing, of padding, would have an output of NaN,
        # which the next layer's products carry to the tokens that do not attend to it.
        scores = scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.bmm(shares.view(pairs, lines, keys), value.reshape(pairs, keys, -1))
    return output.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS["sdpa"] = half_attention
