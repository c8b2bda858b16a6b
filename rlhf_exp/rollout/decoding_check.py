"""Whether a model that is decoded token by token is the model: log-probabilities side by side.

A family may do what its structure does not show: attend to less than everything, keep a state, bias
by distance, scale its positions. Two rows of unequal length tell.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_exp.models.comparison import random_rows, short_windows
from rlhf_exp.rollout.decoder import CacheKind, Decoder, decoding_mode

PROMPTS, STEPS = (13, 3), 11
"""Lengths of two prompts, and tokens decoded after each: the longer prompt, and the shorter row as
it grows, exceed the window that is set meanwhile."""


@torch.inference_mode()
def decoding_difference(model: PreTrainedModel, cache: CacheKind = "slots") -> float:
    """Return the largest difference between decoded and whole log-probabilities, in nats.

    Two rows of random tokens go through the sampler's decoder: prompts of unequal length at once,
    then token by token; where the cache has slots, a third row ends half-way and the last row takes
    its slot. Each position's log-probabilities of all tokens are compared with those of
    `model(input_ids)`, row by row.

    Args:
        model: a causal language model, not inside a peft wrapper.
        cache: who keeps the keys, values and states of earlier tokens.

    Returns:
        At least 0; NaN if the model's own log-probabilities are.

    Raises:
        UserError: the model cannot be decoded like this, and says so.
        Exception: it cannot, and fails somewhere inside.
    """
    # The sampler refuses rows at whose lengths positions would be scaled (`longest=0`).
    with decoding_mode(model), short_windows(model, longest=0):
        rows = random_rows(model, [length + STEPS for length in PROMPTS])
        whole = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        expected = [logits.float().log_softmax(-1) for logits in whole]
        decode = _decode_slots if cache == "slots" else _decode_lockstep
        differences = [
            (logits.log_softmax(-1) - expected[row][position]).abs().max()
            for row, position, logits in decode(model, rows)
        ]
    return float(torch.stack(differences).max())


Decoded = Iterator[tuple[int, int | Tensor, Tensor]]
"""Row, position, and the logits [V] after the token there."""


def _decode_slots(model: PreTrainedModel, rows: list[Tensor]) -> Decoded:
    tokens = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=model.device) - STEPS
    decoder = Decoder(model, "slots", 3, tokens.shape[1], None)
    held = [0, 0, 1]  # the row in each slot
    prompts = tokens[held, : int(lengths.max())]
    logits = decoder.prefill(prompts, lengths[held], slice(0, 3), 1.0)
    yield from zip(held, lengths[held] - 1, logits, strict=True)
    for step in range(STEPS):
        if step == STEPS // 2:
            origin, target = torch.tensor([[2], [0]], device=model.device)
            decoder.move(origin, target, tokens.shape[1])
            held = [1, 0]
        positions = lengths[held] + step
        longest = int(positions.max()) + 1
        logits = decoder.step(tokens[held, positions], positions, longest, 1.0)
        yield from zip(held, positions, logits, strict=True)


def _decode_lockstep(model: PreTrainedModel, rows: list[Tensor]) -> Decoded:
    for number, row in enumerate(rows):
        decoder = Decoder(model, "library", 1, len(row), None)
        length = len(row) - STEPS
        lengths = torch.tensor([length], device=model.device)
        yield number, length - 1, decoder.prefill(row[None, :length], lengths, slice(0, 1), 1.0)[0]
        for position in range(length, len(row)):
            positions = torch.tensor([position], device=model.device)
            yield number, position, decoder.step(row[positions], positions, position + 1, 1.0)[0]
