"""One pass of the frozen trunk over sampled responses, for all that is computed above it.

Where sampling does not keep the trunk's states exactly (in bfloat16, or in an engine elsewhere), a
reward model over the policy's trunk and the comparison with the reference would each run it.

B rows, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.batch import Samples
from rlhf_exp.data.batching import length_sorted_micro_batches
from rlhf_exp.models.pretrained import context_of
from rlhf_exp.rollout.decoder import decoding_mode
from rlhf_exp.rollout.slot_cache import SlotCache


@torch.no_grad()
def with_trunk_states(
    samples: Samples, trunk: PreTrainedModel, batch: int, closing_token: int
) -> Samples:
    """Return `samples` with the states that leave the trunk, and those of a closing token.

    The closing token stands after each response's content; what ended the response may stand there
    too. So all tokens are run first, and then the closing tokens over the keys and values of what
    is before them.

    Args:
        samples: B responses, on the trunk's device.
        trunk: the model's lowest blocks, without a final norm.
        batch: rows of a pass.
        closing_token: its id.

    Returns:
        The same with `states` [B, S, D] and `closing` [B, D]; without them where the model has no
        position left for a closing token.
    """
    ends = samples.prompt_lengths + samples.content_lengths
    context = context_of(trunk.config)
    if context is not None and int(ends.max()) >= context:
        return samples
    lengths = (samples.prompt_lengths + samples.response_lengths).cpu()
    device = samples.tokens.device
    columns = torch.arange(int(lengths.max()) + 1, device=device)
    states: Tensor | None = None
    closing: Tensor | None = None
    with decoding_mode(trunk):
        for rows in length_sorted_micro_batches(lengths, batch):
            longest = int(lengths[rows].max())
            tokens = samples.tokens[rows, :longest]
            cache = SlotCache(trunk, len(rows), longest + 1)
            positions = columns[:longest].expand(tokens.shape)
            with cache.prefilling(positions, slice(0, len(rows))) as arguments:
                found = trunk(input_ids=tokens, use_cache=True, **arguments).last_hidden_state
            last = torch.full((len(rows), 1), closing_token, device=device)
            with cache.stepping(ends[rows], longest + 1) as arguments:
                after = trunk(input_ids=last, use_cache=True, **arguments).last_hidden_state
            if states is None or closing is None:
                shape = (*samples.tokens.shape, found.shape[2])
                states, closing = found.new_zeros(shape), found.new_zeros(shape[0], shape[2])
            states[rows, :longest], closing[rows] = found, after[:, 0]
    return replace(samples, states=states, closing=closing)
