"""Sampling responses from a causal language model.

The loop itself is `rollout/loop.py`. What is trained on is sampled from the whole distribution, as
the distribution that is sampled must be the one that is trained; an evaluation may cut it (top-p,
top-k). Everything else that `transformers.generate` can do (beams, penalties) is left out.

A lean decode loop over the cached forward.

Dimensions: B prompts, P prompt tokens, T response tokens, S = P + T, A active slots, D width.

Rows live in slots, each at its own length. Rows that have ended leave, the last active ones taking
their slots, and once enough slots are free, waiting prompts move in, longest first. None of this
changes what a row says: its noise is a function of (seed, rollout, position), and attention sees
nothing but the row.

How to sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.errors import UserError
from rlhf_exp.rollout.decoder import Decoder, SlotTable, ready_to_decode
from rlhf_exp.rollout.token_sampling import draw, truncated, uniform, usable
from rlhf_exp.rollout.transcript import KeptStates, Stopper, Transcript

__all__ = ["Sampling", "sample"]

Sampler = Callable[[Prompts], Samples]
"""Answers prompts."""


def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: Sampling,
    seed: int,
    stopper: Stopper | None = None,
    capture: nn.Module | None = None,
    close: int | None = None,
) -> Samples:
    """Return a response to each prompt, in the prompts' order, on the model's device.

    Dropout is off meanwhile. What a row says depends on its prompt, its `rollout` number, the
    seed and the weights; on other rows and the batch only through rounding.

    Args:
        model: a causal language model (inside a peft wrapper or not).
        prompts: at least one row, each of at least one token.
        settings: how to sample.
        seed: of the noise.
        stopper: finds stop strings, or None.
        capture: a decoder block of `model`; the hidden states entering it become `Samples.states`.
        close: a token whose states after each response's content become `Samples.closing`; they do
            not where the model has no position for it.

    Raises:
        UserError: where a prompt and its response exceed the model's positions.
    """
    unwrap = getattr(model, "get_base_model", None)
    if unwrap is not None:
        model = unwrap()
    limits = _limits(model)
    _check(limits, prompts, settings)
    room = min([*limits.values(), math.inf]) - int(prompts.lengths.max()) - settings.max_new_tokens
    close = close if capture is not None and room >= CLOSING_ROOM else None
    with ready_to_decode(model):
        loop = DecodeLoop(model, prompts, settings, seed, stopper, capture, close)
        with torch.inference_mode():
            loop.run()
    return loop.samples()


def _limits(model: PreTrainedModel) -> dict[str, int]:
    """Return the most tokens of a sequence, by what says so in the model's config."""
    config = model.config.get_text_config()
    limits = {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}
    if getattr(config, "use_sliding_window", True):
        # Within the window sliding attention is full attention; beyond it the mask would be wrong.
        limits["sliding_window"] = getattr(config, "sliding_window", None)
    return {name: limit for name, limit in limits.items() if limit is not None}


def _check(limits: dict[str, int], prompts: Prompts, settings: Sampling) -> None:
    assert len(prompts), "no prompts"
    assert settings.max_new_tokens > 0, f"max_new_tokens {settings.max_new_tokens} is not above 0"
    assert settings.temperature > 0, f"temperature {settings.temperature} is not above 0"
    assert 0 < settings.top_p <= 1, f"top_p {settings.top_p} is not above 0 and at most 1"
    assert settings.top_k >= 0, f"top_k {settings.top_k} is below 0"
    assert int(prompts.lengths.min()) > 0, "a prompt without tokens"
    longest = int(prompts.lengths.max())
    for name, limit in limits.items():
        if longest + settings.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={settings.max_new_tokens} exceed "
                f"the model's {name}={limit}: cut prompts shorter (seq_length) or lower "
                "max_new_tokens"
            )


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

CLOSING_ROOM = 2
"""Positions after a row's last token that closing it takes: its own, and one to run on to."""

ACCELERATOR_COLUMNS = 64
"""On an accelerator attention reads a multiple of so many columns, for the sake of its kernels."""


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
        close: a token whose states after each row's content are wanted too, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: Sampling,
        seed: int,
        stopper: Stopper | None,
        capture: nn.Module | None,
        close: int | None,
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
        spare = 0 if close is None else CLOSING_ROOM
        self._table = SlotTable(slots, limit, device, spare)
        # A multiple of 8 and a little more: where attention kernels want aligned masks.
        self._width = -(-(max(self._lengths) + limit + spare) // 8) * 8
        self._decoder = Decoder(model, slots, self._width, capture)
        # One column more than tokens, for slots that run on.
        self._logprobs = torch.zeros(rows, limit + 1, device=device)
        steps = torch.arange(limit + 1, device=device)
        self._noise = usable(uniform(seed, self._prompts.rollout.unsqueeze(1), steps))
        self._states = KeptStates(rows, self._width)
        self._close = close

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
                    steps = [self._step() for _ in range(stride)]
                    if self._close is not None:
                        self._close_content(table.fed())
                    self._look(active, steps)

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
            self._states.put(index, slice(0, longest), self._decoder.captured)
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
            columns = position if self._close is None else table.kept_at(self._states.closing)
            self._states.put(table.row[active], columns, self._decoder.captured[:, 0])
        return self._draw(logits, active)

    def _draw(self, logits: Tensor, slots: slice) -> Tensor:
        row, column = self._table.row[slots], self._table.column[slots]
        settings = self._settings
        noise = None if settings.greedy else self._noise[row, column]
        if not (settings.greedy or settings.whole):
            logits = truncated(logits, settings.top_p, settings.top_k)
        tokens, logprobs = draw(logits, noise)
        self._logprobs[row, column] = logprobs
        self._table.advance(slots, tokens)
        return tokens

    def _look(self, slots: slice, steps: list[Tensor]) -> None:
        """Write down the tokens drawn for `slots` in each of `steps`, and see which rows end."""
        table, ended = self._table, []
        for offset, tokens in enumerate(zip(*torch.stack(steps).tolist(), strict=True)):
            slot = slots.start + offset
            row = table.held[slot]
            if row is None or table.closing[slot]:
                continue
            if any(self._transcript.add(row, token) for token in tokens):
                ended.append(slot)
        if self._close is None:
            for slot in ended:
                table.held[slot] = None
            return
        whole = [slot for slot in ended if self._content_end(slot) == self._end(slot)]
        if whole:
            # All that was said is content, and its last token has not been fed yet.
            last = [self._transcript.responses[self._held(slot)][-1] for slot in whole]
            table.feed(whole, last, [self._end(slot) - 1 for slot in whole], more=2)
        self._close_content([slot for slot in ended if slot not in whole])

    def _close_content(self, slots: list[int]) -> None:
        """Feed the rows in `slots` the closing token, after their content."""
        if slots:
            assert self._close is not None
            ends = [self._content_end(slot) for slot in slots]
            tokens = [self._close] * len(slots)
            self._table.feed(slots, tokens, ends, more=1, kept=self._states.closing)

    def _held(self, slot: int) -> int:
        row = self._table.held[slot]
        assert row is not None, f"slot {slot} holds no row"
        return row

    def _end(self, slot: int) -> int:
        """Return the position after the last token said."""
        row = self._held(slot)
        return self._lengths[row] + len(self._transcript.responses[row])

    def _content_end(self, slot: int) -> int:
        """Return the position after the content's last token."""
        row = self._held(slot)
        return self._lengths[row] + self._transcript.content_lengths[row]

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
        content = torch.tensor(self._transcript.content_lengths, device=device)
        outside = ~response_mask(said, columns)
        # The last token was never fed, unless it is content that was closed; and beyond there is
        # only what ran on.
        fed = said - 1 if self._close is None else torch.maximum(said - 1, content)
        return Samples(
            tokens=tokens.to(device),
            prompt_lengths=lengths,
            response_lengths=said,
            content_lengths=content,
            finish=torch.tensor([int(end) for end in self._transcript.finish], device=device),
            index=self._prompts.index,
            logprobs=self._logprobs[:, :columns].masked_fill(outside, 0.0),
            states=self._states.of_tokens(lengths + fed, width),
            closing=None if self._close is None else self._states.of_closing(),
        )


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
        top_p: above 0, at most 1: sample from the nucleus of this probability only. Here and with
            `top_k`, `Samples.logprobs` are those of the distribution that was cut and scaled up.
        top_k: sample from so many most probable tokens only; 0 for all.
    """

    max_new_tokens: int
    temperature: float
    batch: int
    eos_id: int
    pad_id: int
    greedy: bool = False
    top_p: float = 1.0
    top_k: int = 0

    @property
    def whole(self) -> bool:
        """Whether every token can be drawn: what training needs of its samples."""
        return self.top_p == 1.0 and self.top_k == 0
