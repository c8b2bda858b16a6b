"""Sampling of responses from a causal language model: a decode loop over slots.

Training samples from the full distribution, since the distribution that is sampled must be the one
that is trained; an evaluation may truncate it (top-p, top-k). Everything else that
`transformers.generate` can do (beams, penalties) is left out.

B prompts, P prompt tokens, T response tokens, S = P + T, A active slots, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import context_of
from rlhf_exp.rollout.decoder import CacheKind, Decoder, SlotTable, decoding_mode
from rlhf_exp.rollout.step_graphs import CudaRecorder, Recorder, StepGraphs
from rlhf_exp.rollout.token_sampling import draw_tokens, to_float32, truncate_logits, uniform
from rlhf_exp.rollout.transcript import CapturedStates, OnRow, Stopper, Transcript

HOST_PREFILL_TOKENS = 2048
ACCELERATOR_PREFILL_TOKENS = 32768
"""Most tokens, padding included, of one forward pass over prompts; on a CPU they fit its cache."""

REFILL_SHARE = 4
"""Waiting prompts get slots when 1 / REFILL_SHARE of the slots is free."""

COMPACT_SHARE = 16
"""Slots of ended rows are compacted away when they are 1 / COMPACT_SHARE of the active slots."""

ACCELERATOR_STRIDE = 8
"""Tokens decoded on an accelerator before the host reads them: each read waits for the device.
It reads those of a stride while the next one runs. Rows that ended meanwhile have surplus tokens,
which are cut off."""

CLOSING_ROOM = 2
"""Positions that the closing token takes after a row's last token: its own and a spare one."""

ACCELERATOR_COLUMNS = 64
"""On an accelerator attention reads a multiple of so many columns: its kernels are faster then, and
few graphs serve all steps."""

ROW_SIZES = 4
"""On an accelerator the numbers of rows of a step are so many between a power of two and the next,
for the same reason; the rows beyond the active ones are idle."""


@dataclass(frozen=True)
class SamplingParams:
    """Lengths, temperature and truncation of the sampling distribution.

    Attributes:
        max_new_tokens: T, at least 1.
        temperature: above 0; logits are divided by it.
        batch: most rows decoded at the same time.
        eos_id: ends a response; -1 for none.
        end_ids: further tokens that do.
        pad_id: fills `Samples.tokens` on the right.
        greedy: take the most probable token instead of sampling.
        top_p: above 0, at most 1: sample from the nucleus of this probability only. With this and
            `top_k`, `Samples.logprobs` are those of the truncated, renormalised distribution.
        top_k: sample from so many most probable tokens only; 0 for all.
        cache: who keeps the keys, values and states of earlier tokens.
    """

    max_new_tokens: int
    temperature: float
    batch: int
    eos_id: int
    pad_id: int
    greedy: bool = False
    top_p: float = 1.0
    top_k: int = 0
    cache: CacheKind = "slots"
    end_ids: frozenset[int] = frozenset()

    @property
    def untruncated(self) -> bool:
        """Whether every token can be drawn, as training requires of its samples."""
        return self.top_p == 1.0 and self.top_k == 0


Sampler = Callable[[Prompts], Samples]
"""Samples a response to each prompt."""


def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: SamplingParams,
    seed: int,
    stopper: Stopper | None = None,
    capture: nn.Module | None = None,
    close: int | None = None,
    on_ended: Callable[[int], None] | None = None,
    on_row: OnRow | None = None,
) -> Samples:
    """Return a response to each prompt, in the prompts' order, on the model's device.

    The model is in eval mode meanwhile. A response depends on its prompt, its `rollout` number, the
    seed and the weights; on other rows and the batch only through rounding.

    Args:
        model: a causal language model (inside a peft wrapper or not).
        prompts: at least one row, each of at least one token.
        settings: temperature, lengths and the like.
        seed: of the random numbers.
        stopper: finds stop strings, or None.
        capture: a decoder block of `model`; the hidden states entering it become `Samples.states`.
        close: a token to feed after each response's content; its states become `Samples.closing`,
            unless the model has no position left for it, or rows are decoded in lockstep.
        on_ended: told how many responses have ended, for a progress display.
        on_row: told each response as it ends.

    Raises:
        UserError: a prompt and its response exceed the model's positions.
    """
    unwrap_peft = getattr(model, "get_base_model", None)
    if unwrap_peft is not None:
        model = unwrap_peft()
    context = context_of(model.config) or math.inf
    longest = int(prompts.lengths.max()) + settings.max_new_tokens
    _check(prompts, settings)
    if longest > context:
        raise UserError(
            f"a prompt of {longest - settings.max_new_tokens} tokens and max_new_tokens="
            f"{settings.max_new_tokens} exceed the {context} tokens at which the model's positions "
            "end: cut prompts shorter (seq_length) or lower max_new_tokens"
        )
    # The content may end before the response does, and the library's cache does not go back.
    room = context - longest >= CLOSING_ROOM
    closable = capture is not None and room and settings.cache == "slots"
    close = close if closable else None
    with decoding_mode(model):
        loop = DecodeLoop(model, prompts, settings, seed, stopper, capture, close, on_ended, on_row)
        with torch.inference_mode():
            loop.run()
    return loop.samples()


def _check(prompts: Prompts, settings: SamplingParams) -> None:
    assert len(prompts), "no prompts"
    assert settings.max_new_tokens > 0, f"max_new_tokens {settings.max_new_tokens} is not above 0"
    assert settings.temperature > 0, f"temperature {settings.temperature} is not above 0"
    assert 0 < settings.top_p <= 1, f"top_p {settings.top_p} is not above 0 and at most 1"
    assert settings.top_k >= 0, f"top_k {settings.top_k} is below 0"
    assert int(prompts.lengths.min()) > 0, "a prompt without tokens"


def on_accelerator(device: torch.device) -> bool:
    """Return whether the host has to wait for `device` before it can read a result."""
    return device.type != "cpu"


def step_recorder(device: torch.device) -> Recorder | None:
    """Return what records decode steps of `device` as graphs, or None where there are none."""
    return CudaRecorder(device) if device.type == "cuda" else None


def rows_of_step(active: int, slots: int) -> int:
    """Return the number of slots, at least `active`, that take part in a step on an accelerator."""
    size = max(1, (1 << (active - 1).bit_length()) // (2 * ROW_SIZES))
    return min(-(-active // size) * size, slots)


def read_later(values: Tensor) -> Callable[[], list[list[int]]]:
    """Begin to copy `values` to the host; return what waits for them, and for nothing later."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[list[int]]:
        copied.synchronize()
        return copy.tolist()

    return read


class DecodeLoop:
    """One sampling call: `run` it in inference mode, then take the `samples` outside of it.

    Rows live in slots, each at its own length. Slots of rows that have ended are taken over by the
    last active rows, and once enough slots are free, waiting prompts move in, longest first. None
    of this changes a response: its random numbers are a function of (seed, rollout, position), and
    attention sees nothing but the row.

    In lockstep, as the library's cache wants it, a group of rows begins and ends together. Prompts
    are prefilled up to the shortest one's end; the longer ones' other tokens are then fed one by
    one, in place of drawn ones.

    Args:
        model: the causal language model, in evaluation mode.
        prompts: B rows.
        settings: temperature, lengths and the like.
        seed: of the random numbers.
        stopper: finds stop strings, or None.
        capture: a decoder block whose incoming states are captured, or None.
        close: a token to feed after each row's content, whose states are captured too, or None.
        on_ended: told how many rows have ended, or None.
        on_row: told each response as it ends, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: SamplingParams,
        seed: int,
        stopper: Stopper | None,
        capture: nn.Module | None,
        close: int | None,
        on_ended: Callable[[int], None] | None = None,
        on_row: OnRow | None = None,
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
        ends = {settings.eos_id, *settings.end_ids}
        self._transcript = Transcript(rows, limit, ends, stopper, on_row)
        spare = 0 if close is None else CLOSING_ROOM
        self._table = SlotTable(slots, limit, device, spare, idle_row=rows)
        # A multiple of 8: attention kernels want aligned masks.
        self._width = -(-(max(self._lengths) + limit + spare) // 8) * 8
        self._decoder = Decoder(model, settings.cache, slots, self._width, capture)
        lockstep = self._decoder.lockstep
        self._refill_share = 1 if lockstep else REFILL_SHARE
        self._compact_share = 1 if lockstep else COMPACT_SHARE
        # One column more than tokens, for slots that run on; one row more, for idle slots.
        self._logprobs = torch.zeros(rows + 1, limit + 1, device=device)
        steps = torch.arange(limit + 1, device=device)
        rollouts = nn.functional.pad(self._prompts.rollout, (0, 1))
        self._uniforms = to_float32(uniform(seed, rollouts.unsqueeze(1), steps))
        self._states = CapturedStates(rows, self._width)
        self._close = close
        self._on_ended = on_ended
        self._stride = 1 if self._on_host else ACCELERATOR_STRIDE
        self._unread: Callable[[], list[list[int]]] | None = None
        recorder = None if lockstep else step_recorder(device)
        self._graphs = None
        if recorder is not None:
            self._graphs = StepGraphs(model, self._table.state, self._logprobs, recorder)

    def run(self) -> None:
        """Sample until every row has ended."""
        table = self._table
        with self._decoder.capturing():
            while self._waiting or table.active:
                moves = self._compacts() or self._admits()
                if self._unread is not None and (moves or not self._goes_on()):
                    self._record_unread()  # its rows are in the slots still that they were in
                if self._compacts():
                    origins, targets = table.compact()
                    if len(origins):
                        self._decoder.move(origins, targets, self._width)
                if self._admits():
                    self._admit()
                    while self._waiting and table.free and not self._decoder.lockstep:
                        self._admit()
                elif table.active:
                    self._decode()
                if self._on_ended is not None:
                    under_way = table.active - table.ended + len(self._waiting)
                    self._on_ended(len(self._prompts) - under_way)

    def _compacts(self) -> bool:
        """Return whether there are enough slots of ended rows to compact them away."""
        return self._table.ended * self._compact_share >= self._table.active > 0

    def _admits(self) -> bool:
        """Return whether prompts wait and enough slots are free."""
        return bool(self._waiting) and self._table.free * self._refill_share >= self._table.slots

    def _goes_on(self) -> bool:
        """Return whether a row may need more tokens than those of the stride that is unread."""
        decoded, limit = self._stride, self._settings.max_new_tokens
        responses = self._transcript.responses
        rows = zip(self._table.held, self._table.closing, strict=True)
        return any(
            row is not None and (closing or len(responses[row]) + decoded < limit)
            for row, closing in rows
        )

    def _decode(self) -> None:
        """Decode a stride of tokens of every active slot, and record the one before it."""
        table = self._table
        active = slice(0, table.active)
        rows, columns = table.active, table.longest
        if not self._on_host:
            rows = rows if self._decoder.lockstep else rows_of_step(rows, table.slots)
            columns += self._stride - 1
            columns = -(-columns // ACCELERATOR_COLUMNS) * ACCELERATOR_COLUMNS
        shape = rows, min(columns, self._width)
        steps = []
        for _ in range(self._stride):
            if self._graphs is None:
                steps.append(self._step(*shape)[active])
            else:
                self._graphs.run(shape, partial(self._step, *shape))
                steps.append(table.token[active].clone())
            table.count_step(active)
        if self._close is not None:
            self._close_content(table.count_fed())
        following = read_later(torch.stack(steps))
        self._record_unread()
        self._unread = following
        if self._on_host:
            self._record_unread()

    def _record_unread(self) -> None:
        """Record the stride that has been decoded and not been read, if there is one."""
        if self._unread is not None:
            self._record(0, self._unread())
            self._unread = None

    def _admit(self) -> None:
        """Prefill free slots with a group of waiting prompts and draw their first tokens."""
        lockstep = self._decoder.lockstep
        longest = self._lengths[self._waiting[-1]]
        # In lockstep a larger group pays at every later token.
        small = self._on_host and not lockstep
        most = HOST_PREFILL_TOKENS if small else ACCELERATOR_PREFILL_TOKENS
        count = min(self._table.free, max(1, most // longest), len(self._waiting))
        rows = [self._waiting.pop() for _ in range(count)]
        lengths = [self._lengths[row] for row in rows]
        fed = [min(lengths)] * count if lockstep else lengths
        slots = self._table.fill(rows, lengths, fed)
        index = self._table.row[slots]
        tokens = self._prompts.tokens[index, : fed[0]]
        ends = self._table.position[slots] + 1
        logits = self._decoder.prefill(tokens, ends, slots, self._scale)
        if self._decoder.captured is not None:
            self._states.store(index, slice(0, fed[0]), self._decoder.captured)
        tokens = self._draw(logits, slots)
        self._table.count_step(slots)
        self._record(slots.start, tokens[None].tolist())

    def _step(self, rows: int, columns: int) -> Tensor:
        """Decode one token of each of the first slots and return them [rows].

        It is recorded as a graph: its work on the device is a function of its arguments and of
        tensors at fixed addresses, and the host does nothing else.

        Args:
            rows: number of slots.
            columns: number of columns to attend to; above every position.
        """
        table, slots = self._table, slice(0, rows)
        position = table.position[slots]
        logits = self._decoder.step(table.token[slots], position, columns, self._scale)
        if self._decoder.captured is not None:
            stored = position
            if self._close is not None:
                stored = table.state_columns(slots, self._states.closing)
            self._states.store(table.row[slots], stored, self._decoder.captured[:, 0])
        return self._draw(logits, slots)

    def _draw(self, logits: Tensor, slots: slice) -> Tensor:
        """Draw the next tokens [A] of `slots`; -1 where a prompt's own token comes next."""
        row, column = self._table.row[slots], self._table.column[slots]
        in_prompt = None
        if self._decoder.lockstep:
            in_prompt = column < 0
            column = column.clamp(min=0)  # what is written there meanwhile is overwritten
        settings = self._settings
        uniforms = None if settings.greedy else self._uniforms[row, column]
        if not (settings.greedy or settings.untruncated):
            logits = truncate_logits(logits, settings.top_p, settings.top_k)
        tokens, logprobs = draw_tokens(logits, uniforms)
        self._logprobs[row, column] = logprobs
        if in_prompt is None:
            self._table.advance(slots, tokens)
            return tokens
        following = (self._table.position[slots] + 1).clamp(max=self._prompts.tokens.shape[1] - 1)
        prompt_tokens = self._prompts.tokens[row, following]
        self._table.advance(slots, torch.where(in_prompt, prompt_tokens, tokens))
        return tokens.masked_fill_(in_prompt, -1)

    def _record(self, first: int, steps: list[list[int]]) -> None:
        """Append drawn tokens to their rows, and end finished rows.

        Args:
            first: slot of the first row.
            steps: the tokens of each step, by slot; below 0 where none was drawn.
        """
        table, ended = self._table, []
        for slot, tokens in enumerate(zip(*steps, strict=True), start=first):
            row = table.held[slot]
            if row is None or table.closing[slot]:
                continue
            if any(self._transcript.add(row, token) for token in tokens if token >= 0):
                ended.append(slot)
        if self._close is None:
            for slot in ended:
                table.held[slot] = None
            return
        unfed = [slot for slot in ended if self._content_end(slot) == self._end(slot)]
        if unfed:
            # The whole response is content, and its last token has not been fed yet.
            last = [self._transcript.responses[self._row_in(slot)][-1] for slot in unfed]
            table.feed(unfed, last, [self._end(slot) - 1 for slot in unfed], remaining=2)
        self._close_content([slot for slot in ended if slot not in unfed])

    def _close_content(self, slots: list[int]) -> None:
        """Feed the rows in `slots` the closing token, after their content."""
        if slots:
            assert self._close is not None
            ends = [self._content_end(slot) for slot in slots]
            tokens = [self._close] * len(slots)
            self._table.feed(slots, tokens, ends, remaining=1, state_column=self._states.closing)

    def _row_in(self, slot: int) -> int:
        row = self._table.held[slot]
        assert row is not None, f"slot {slot} holds no row"
        return row

    def _end(self, slot: int) -> int:
        """Return the position after the response's last token."""
        row = self._row_in(slot)
        return self._lengths[row] + len(self._transcript.responses[row])

    def _content_end(self, slot: int) -> int:
        """Return the position after the content's last token."""
        row = self._row_in(slot)
        return self._lengths[row] + self._transcript.content_lengths[row]

    def samples(self) -> Samples:
        """Return all rows in the prompts' order, cut to the longest row and response."""
        device = self._logprobs.device
        responses = self._transcript.responses
        response_lengths = torch.tensor([len(response) for response in responses])
        prompt_lengths = torch.tensor(self._lengths)
        width = int((prompt_lengths + response_lengths).max())
        columns = int(response_lengths.max())
        tokens = torch.full((len(responses), width), self._settings.pad_id)
        prompts = self._prompts.tokens.cpu()
        for row, (start, response) in enumerate(zip(self._lengths, responses, strict=True)):
            tokens[row, :start] = prompts[row, :start]
            tokens[row, start : start + len(response)] = torch.tensor(response)
        response_lengths = response_lengths.to(device)
        prompt_lengths = prompt_lengths.to(device)
        content = torch.tensor(self._transcript.content_lengths, device=device)
        outside = ~response_mask(response_lengths, columns)
        # The last token was never fed, unless it is content before a closing token. Columns beyond
        # hold states of surplus tokens.
        fed = response_lengths - 1
        if self._close is not None:
            fed = torch.maximum(fed, content)
        return Samples(
            tokens=tokens.to(device),
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            content_lengths=content,
            finish=torch.tensor([int(end) for end in self._transcript.finish], device=device),
            index=self._prompts.index,
            logprobs=self._logprobs[: len(responses), :columns].masked_fill(outside, 0.0),
            states=self._states.token_states(prompt_lengths + fed, width),
            closing=None if self._close is None else self._states.closing_states(),
        )
