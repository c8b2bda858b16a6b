"""Whether a model that is decoded token by token is the model: log-probabilities side by side.

A family may do what its structure does not show: attend to less than everything, keep a state, bias
by distance, scale its positions. Two rows of unequal length tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_exp.rollout.decoder import CacheKind, Decoder, decoding_mode

PROMPTS, STEPS, WINDOW = (13, 3), 11, 8
"""Lengths of two prompts, and tokens decoded after each: the longer prompt, and the shorter row as
it grows, exceed the window that is set meanwhile."""

SHORTENED = ("sliding_window", "attention_chunk_size")
"""Fields of a config that the library reads at each forward pass; set to `WINDOW` meanwhile."""

FIXED = ("window_size", "attention_window_size", "attention_window")
"""Fields that are read when a model is built; the prompts are made longer than these instead."""

LONGEST = 512
"""Most tokens of a prompt; a fixed window above it is not looked beyond."""


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
    with decoding_mode(model), _short_windows(model):
        rows = _random_rows(model)
        whole = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        expected = [logits.float().log_softmax(-1) for logits in whole]
        decode = _decode_slots if cache == "slots" else _decode_lockstep
        differences = [
            (logits.log_softmax(-1) - expected[row][position]).abs().max()
            for row, position, logits in decode(model, rows)
        ]
    return float(torch.stack(differences).max())


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let windows end within the rows that are compared."""
    config = cast(PreTrainedModel, model.base_model).config.get_text_config()
    found = {name: getattr(config, name, None) for name in SHORTENED}
    wide = {
        name: width for name, width in found.items() if isinstance(width, int) and width > WINDOW
    }
    try:
        for name in wide:
            setattr(config, name, WINDOW)
        yield
    finally:
        for name, width in wide.items():
            setattr(config, name, width)


def _random_rows(model: PreTrainedModel) -> list[Tensor]:
    """Return two rows of random tokens, the longer one first."""
    config = cast(PreTrainedModel, model.base_model).config.get_text_config()
    windows = [getattr(config, name, None) for name in FIXED]
    window = max((width for width in windows if isinstance(width, int)), default=0)
    room = getattr(config, "max_position_embeddings", None) or LONGEST + STEPS
    long = max(PROMPTS[0], min(window + 5, LONGEST, room - STEPS))
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.vocab_size
    return [
        torch.randint(vocabulary, (length + STEPS,), generator=generator).to(model.device)
        for length in (long, PROMPTS[1])
    ]


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
