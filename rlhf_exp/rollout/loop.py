"""A lean decode loop over the cached forward.

Dimensions: B prompts, P prompt tokens, T response tokens, S = P + T, A active slots, D width.

Rows live in slots, each at its own length. Rows that have ended leave, the last active ones taking
their slots, and once enough slots are free, waiting prompts move in, longest first. None of this
changes what a row says: its noise is a function of (seed, rollout, position), and attention sees
nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.rollout.decoder import Decoder
from rlhf_exp.rollout.draw import draw, usable
from rlhf_exp.rollout.noise import uniform
from rlhf_exp.rollout.slots import SlotTable
from rlhf_exp.rollout.stops import Stopper
from rlhf_exp.rollout.transcript import Transcript

HOST_PREFILL_TOKENS = 2048
ACCELERATOR_PREFILL_TOKENS = 32768
"""Most tokens, padding included, of one forward over prompts: a CPU wants to stay in its cache."""

REFILL_SHARE = 4
"""Waiting prompts move in when 1 / REFILL_SHARE of the slots is free."""

CLEAR_SHARE = 16
"""Ended rows are cleared away when they hold 1 / CLEAR_SHARE of the active slots."""

ACCELERATOR_STRIDE = 8
"""Tokens decoded on an accelerator before the host looks at them: each look waits for the device.
Rows that ended meanwhile have said too much, which is cut off."""

ACCELERATOR_COLUMNS = 64
"""On an accelerator attention reads a multiple of so many columns, for the sake of its kernels."""


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: T, at least 1.
        temperature: above 0; logits are divided by it.
        batch: most rows decoded at the same time.
        eos_id: ends a response; -1 for none.
        pad_id: fills `Samples.tokens` on the right.
        greedy: take the most probable token instead of sampling.
    """

    max_new_tokens: int
    temperature: float
    batch: int
    eos_id: int
    pad_id: int
    greedy: bool = False


def on_accelerator(device: torch.device) -> bool:
    """Return whether the host must wait for `device` to see a result."""
    return device.type != "cpu"


class DecodeLoop:
    """One sampling call: `run` it in inference mode, then ask for the `samples` outside of it.

    Args:
        model: the causal language model, in evaluation mode.
        prompts: B rows.
        settings: how to sample.
        seed: of the noise.
        stopper: finds stop strings, or None.
        capture: a decoder block whose incoming states are wanted, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: Sampling,
        seed: int,
        stopper: Stopper | None,
        capture: nn.Module | None,
    ) -> None:
        device = model.device
        rows, limit = len(prompts), settings.max_new_tokens
        slots = min(settings.batch, rows)
        self._prompts = prompts.to(device)
        self._lengths: list[int] = prompts.lengths.tolist()
        self._waiting = sorted(range(rows), key=lambda row: self._lengths[row])
        self._settings = settings
        self._scale = 1.0 / settings.temperature
        self._on_host = not on_accelerator(device)
        self._transcript = Transcript(rows, limit, settings.eos_id, stopper)
        self._table = SlotTable(slots, limit, device)
        # A multiple of 8 and a little more: where attention kernels want aligned masks.
        self._width = -(-(max(self._lengths) + limit) // 8) * 8
        self._decoder = Decoder(model, slots, self._width, capture)
        # One column more than tokens, for slots that run on.
        self._logprobs = torch.zeros(rows, limit + 1, device=device)
        steps = torch.arange(limit + 1, device=device)
        self._noise = usable(uniform(seed, self._prompts.rollout.unsqueeze(1), steps))
        self._states: Tensor | None = None

    def run(self) -> None:
        """Sample until every row has ended."""
        table = self._table
        stride = 1 if self._on_host else ACCELERATOR_STRIDE
        with self._decoder.capturing():
            while self._waiting or table.active:
                if table.ended * CLEAR_SHARE >= table.active > 0:
                    origins, targets = table.clear()
                    if len(origins):
                        self._decoder.move(origins, targets, self._width)
                if self._waiting and table.free * REFILL_SHARE >= table.slots:
                    while self._waiting and table.free:
                        self._admit()
                elif table.active:
                    active = slice(0, table.active)
                    self._look(active, [self._step() for _ in range(stride)])

    def _admit(self) -> None:
        """Read a group of waiting prompts into free slots and draw their first tokens."""
        longest = self._lengths[self._waiting[-1]]
        most = HOST_PREFILL_TOKENS if self._on_host else ACCELERATOR_PREFILL_TOKENS
        count = min(self._table.free, max(1, most // longest), len(self._waiting))
        rows = [self._waiting.pop() for _ in range(count)]
        slots = self._table.fill(rows, [self._lengths[row] for row in rows])
        index = self._table.row[slots]
        tokens = self._prompts.tokens[index, :longest]
        lengths = self._prompts.lengths[index]
        logits = self._decoder.prefill(tokens, lengths, slots, self._scale)
        if self._decoder.captured is not None:
            self._kept_states(self._decoder.captured)[index, :longest] = self._decoder.captured
        self._look(slots, [self._draw(logits, slots)])

    def _step(self) -> Tensor:
        """Decode one token of every active slot and return them [A]."""
        table = self._table
        active = slice(0, table.active)
        longest = table.longest
        if not self._on_host:
            longest = -(-longest // ACCELERATOR_COLUMNS) * ACCELERATOR_COLUMNS
        position = table.position[active]
        logits = self._decoder.step(
            table.token[active], position, min(longest, self._width), self._scale
        )
        if self._decoder.captured is not None:
            states = self._kept_states(self._decoder.captured)
            states[table.row[active], position] = self._decoder.captured[:, 0]
        return self._draw(logits, active)

    def _draw(self, logits: Tensor, slots: slice) -> Tensor:
        row, column = self._table.row[slots], self._table.column[slots]
        noise = None if self._settings.greedy else self._noise[row, column]
        tokens, logprobs = draw(logits, noise)
        self._logprobs[row, column] = logprobs
        self._table.advance(slots, tokens)
        return tokens

    def _look(self, slots: slice, steps: list[Tensor]) -> None:
        """Write down the tokens drawn for `slots` in each of `steps`, and see which rows end."""
        for offset, tokens in enumerate(zip(*torch.stack(steps).tolist(), strict=True)):
            slot = slots.start + offset
            row = self._table.held[slot]
            if row is not None and any(self._transcript.add(row, token) for token in tokens):
                self._table.held[slot] = None

    def _kept_states(self, like: Tensor) -> Tensor:
        if self._states is None:
            # A tensor made in inference mode could not be trained on.
            with torch.inference_mode(False):
                self._states = torch.zeros(
                    len(self._prompts),
                    self._width,
                    like.shape[-1],
                    dtype=like.dtype,
                    device=like.device,
                )
        return self._states

    def samples(self) -> Samples:
        """Return everything in the prompts' order, cut to what was said."""
        device = self._logprobs.device
        responses = self._transcript.responses
        said = torch.tensor([len(response) for response in responses])
        lengths = torch.tensor(self._lengths)
        width, columns = int((lengths + said).max()), int(said.max())
        tokens = torch.full((len(responses), width), self._settings.pad_id)
        prompts = self._prompts.tokens.cpu()
        for row, (start, response) in enumerate(zip(self._lengths, responses, strict=True)):
            tokens[row, :start] = prompts[row, :start]
            tokens[row, start : start + len(response)] = torch.tensor(response)
        said, lengths = said.to(device), lengths.to(device)
        outside = ~response_mask(said, columns)
        states = None
        if self._states is not None:
            states = self._states[:, :width]
            # The last token was never fed; and beyond it there is only what ran on.
            states.masked_fill_(~response_mask(lengths + said - 1, width).unsqueeze(2), 0.0)
        return Samples(
            tokens=tokens.to(device),
            prompt_lengths=lengths,
            response_lengths=said,
            content_lengths=torch.tensor(self._transcript.content_lengths, device=device),
            finish=torch.tensor([int(end) for end in self._transcript.finish], device=device),
            index=self._prompts.index,
            logprobs=self._logprobs[:, :columns].masked_fill(outside, 0.0),
            states=states,
        )
