"""Incremental decoding: a causal language model over its cache, and the rows in the cache's slots.

N prompts, P tokens of the longest, A active slots, W tokens a slot has room for, T response tokens,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.logprobs import head_logits, product_dtype
from rlhf_exp.batch import to_device
from rlhf_exp.errors import UserError
from rlhf_exp.models.logit_transform import logit_transform
from rlhf_exp.rollout.gptj_attention import fused_attention
from rlhf_exp.rollout.library_cache import LibraryCache
from rlhf_exp.rollout.slot_cache import SlotCache

CacheKind = Literal["slots", "library"]
"""`slots`: rows join and leave while others are half done. `library`: the model's own cache."""


class Decoder:
    """Forward passes of a causal language model over prompts, then token by token.

    The model is a Hugging Face model as it is. Its decoder is called below the language-model head,
    so that logits are computed at last positions only, with explicit positions: nothing has to be
    inferred from padding.

    Args:
        model: the causal language model, in `decoding_mode`.
        cache: who keeps the keys, values and states of earlier tokens.
        slots: rows decoded at the same time.
        width: W, most tokens of a row.
        capture: module of `model` whose incoming hidden states are captured, or None.

    Attributes:
        captured: states that entered `capture` in the last forward pass, [N, P, D] or [A, 1, D].
        lockstep: whether all rows have to be at one position: those of one `prefill`, unpadded.

    Raises:
        UserError: `cache` cannot hold what the model's blocks keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: CacheKind,
        slots: int,
        width: int,
        capture: nn.Module | None,
    ) -> None:
        self.captured: Tensor | None = None
        self._base = cast(PreTrainedModel, model.base_model)
        self._head = _Head(model)
        device = model.device
        self._cache: SlotCache | LibraryCache
        if cache == "slots":
            self._cache = SlotCache(self._base, slots, width)
        else:
            self._cache = LibraryCache(self._base)
        self.lockstep = self._cache.lockstep
        self._columns = torch.arange(width, device=device)
        self._capture = capture

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture the states entering `capture` while the context lasts."""
        if self._capture is None:
            yield
            return
        handle = self._capture.register_forward_pre_hook(self._capture_input, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def prefill(self, tokens: Tensor, lengths: Tensor, slots: slice, scale: float) -> Tensor:
        """Process prompts in `slots` and return the logits [N, V] after each, times `scale`.

        Args:
            tokens: [N, P] int64, right-padded.
            lengths: [N] int64.
            slots: N slots for these rows.
            scale: one over the temperature.
        """
        positions = self._columns[: tokens.shape[1]].expand(tokens.shape)
        with self._cache.prefilling(positions, slots) as arguments:
            hidden = self._forward(tokens, arguments)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self._head(hidden[rows, lengths - 1], scale)

    def step(self, tokens: Tensor, positions: Tensor, longest: int, scale: float) -> Tensor:
        """Feed one token to each of the first A slots and return the logits [A, V], times `scale`.

        Args:
            tokens: [A] int64.
            positions: [A] int64, of these tokens.
            longest: number of columns to attend to; above every position.
            scale: one over the temperature.
        """
        with self._cache.stepping(positions, longest) as arguments:
            hidden = self._forward(tokens.unsqueeze(1), arguments)
        return self._head(hidden[:, 0], scale)

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy the first `longest` columns of slots `origins` [N] to slots `targets` [N]."""
        self._cache.move(origins, targets, longest)

    def _forward(self, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = self._base(input_ids=tokens, use_cache=True, **arguments)
        self._cache.keep(output)
        return output.last_hidden_state

    def _capture_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.captured = args[0] if args else kwargs["hidden_states"]


class _Head:
    """The model's logits, in float32 whatever its head's number format."""

    def __init__(self, model: PreTrainedModel) -> None:
        module = model.get_output_embeddings()
        assert isinstance(module.weight, Tensor), f"no linear head: {type(module).__name__}"
        self._transform = logit_transform(model)
        self._weight = module.weight
        self._bias = getattr(module, "bias", None)
        self._cast: Tensor | None = None

    def __call__(self, hidden: Tensor, scale: float) -> Tensor:
        if self._cast is None:
            dtype = product_dtype(hidden, self._weight)
            # A CPU multiplies in float32 anyway: widen the weight once, not at every token.
            wide = hidden.device.type == "cpu"
            self._cast = self._weight.to(torch.float32 if wide else dtype)
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)  # entering a context is not free
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            states = hidden.to(self._cast.dtype)
            return head_logits(states, self._cast, self._bias, scale, self._transform)


@contextmanager
def decoding_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch to eval mode, and to an attention implementation that takes masks.

    Eval mode turns off dropout and gradient checkpointing. Both are restored in the end.

    Raises:
        UserError: the model's attention takes no mask, and it has no scaled-dot-product attention.
    """
    config = model.config
    attention = config._attn_implementation
    takes_masks = attention in ("eager", "sdpa")
    if not takes_masks and not getattr(model, "_supports_sdpa", False):
        raise UserError(
            f"model.attention: sampling from {type(model).__name__} needs 'eager', found "
            f"{attention!r}; set model.attention=eager"
        )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if not takes_masks:
            config._attn_implementation = "sdpa"
        with fused_attention(model) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        if not takes_masks:
            config._attn_implementation = attention
        for module, training in modes:
            module.training = training


class SlotTable:
    """The row in each slot during one sampling call, on the host and on the device.

    The active slots are the first ones. A slot whose row has ended runs on until it is compacted
    away: its position and column stop at the last one, and what it writes meanwhile is cut off in
    the end.

    Args:
        slots: number of slots.
        max_new_tokens: T, longest response.
        device: of the model.
        spare: positions that a row may run on to after its last token.
        idle_row: the row that slots without one are given: what a step does there changes nothing.

    Attributes:
        slots: number of slots.
        state: [7, slots] int64 on the device: all that a step of decoding reads and changes.
        held: row in each active slot, or None once it has ended.
        row: [slots] int64, the same on the device, an ended row included.
        token: [slots] int64, to feed next.
        position: [slots] int64, of that token; before the first one, that of the last token fed.
        column: [slots] int64, number of the response token to draw next, counted from 0; below 0
            while tokens of the prompt are still to be fed; T once all are drawn.
        closing: of each active slot, number of tokens still fed to a row that has ended.
    """

    def __init__(
        self,
        slots: int,
        max_new_tokens: int,
        device: torch.device,
        spare: int = 0,
        idle_row: int = 0,
    ) -> None:
        self.held: list[int | None] = []
        self.closing: list[int] = []
        self.slots = slots
        self._max_new_tokens, self._spare = max_new_tokens, spare
        # A slot without a row stays at its first position, which attends to itself alone.
        self._idle = torch.zeros(7, 1, dtype=torch.int64, device=device)
        self._idle[0] = idle_row
        self.state = self._idle.repeat(1, slots)
        self.row, self.token, self.position, self.column, _, _, self._state_offset = self.state
        self._moving, self._limits = self.state[2:4], self.state[4:6]
        self._host_position = np.zeros(slots, dtype=np.int64)

    @property
    def active(self) -> int:
        """Number of slots that take part in a forward pass, those of ended rows included."""
        return len(self.held)

    @property
    def ended(self) -> int:
        """Number of active slots whose row has ended."""
        return self.held.count(None)

    @property
    def free(self) -> int:
        """Number of slots that are not active."""
        return self.slots - len(self.held)

    @property
    def longest(self) -> int:
        """Number of columns in use; above the position of every active slot."""
        return int(self._host_position[: self.active].max()) + 1

    def fill(self, rows: Sequence[int], prompt_lengths: Sequence[int], fed: Sequence[int]) -> slice:
        """Assign a free slot to each of `rows` and return these slots.

        Args:
            rows: N rows.
            prompt_lengths: N lengths of their prompts.
            fed: N numbers of prompt tokens that are prefilled, each at least 1.
        """
        slots = slice(self.active, self.active + len(rows))
        self.held.extend(rows)
        self.closing.extend([0] * len(rows))
        lengths = np.asarray(prompt_lengths, dtype=np.int64)
        position = np.asarray(fed, dtype=np.int64) - 1
        zeros = np.zeros_like(lengths)
        last_column = zeros + self._max_new_tokens
        last_position = lengths - 1 + last_column + self._spare
        column = position + 1 - lengths
        values = [np.asarray(rows), zeros, position, column, last_position, last_column, zeros]
        self.state[:, slots] = to_device(torch.from_numpy(np.stack(values)), self.state.device)
        self._host_position[slots] = position
        return slots

    def advance(self, slots: slice, tokens: Tensor) -> None:
        """Make the tokens drawn for `slots` the next ones to feed."""
        self.token[slots] = tokens
        moving = self._moving[:, slots]
        torch.minimum(moving.add_(1), self._limits[:, slots], out=moving)

    def count_step(self, slots: slice) -> None:
        """Count on the host that `slots` have advanced."""
        self._host_position[slots] += 1

    def feed(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        remaining: int,
        state_column: int | None = None,
    ) -> None:
        """Feed one more token to rows that have ended.

        Args:
            slots: N active slots, of these rows.
            tokens: N tokens to feed.
            positions: N positions of these tokens in their rows.
            remaining: number of tokens still fed to these rows, this one included.
            state_column: column in which this token's states are stored (those of the tokens after
                it are not); by default the token's position.
        """
        for slot, position in zip(slots, positions, strict=True):
            self.closing[slot] = remaining
            self._host_position[slot] = position
        values = torch.tensor([slots, tokens, positions], dtype=torch.int64)
        slot_index, token, position_index = to_device(values, self.state.device)
        self.token[slot_index] = token
        self.position[slot_index] = position_index
        if state_column is not None:
            self._state_offset[slot_index] = state_column - position_index

    def count_fed(self) -> list[int]:
        """Count the token fed to each closing row, and release rows that need no more tokens.

        Returns:
            The slots of rows that are fed another token.
        """
        for slot, remaining in enumerate(self.closing):
            if remaining:
                self.closing[slot] = remaining - 1
                if remaining == 1:
                    self.held[slot] = None
        return [slot for slot, remaining in enumerate(self.closing) if remaining]

    def state_columns(self, slots: slice, closing_column: int) -> Tensor:
        """Return the columns [N] in which the states of the tokens fed next are stored.

        Args:
            slots: N slots.
            closing_column: the `state_column` given to `feed`; the column after it takes states
                that nobody reads.
        """
        return (self.position[slots] + self._state_offset[slots]).clamp_(max=closing_column + 1)

    def compact(self) -> tuple[Tensor, Tensor]:
        """Move the rows of the last active slots into the slots of ended rows.

        Returns:
            Slots to copy from and slots to copy to, [N] int64 each, for the cache.
        """
        remaining, before = self.active - self.ended, self.active
        targets = [slot for slot in range(remaining) if self.held[slot] is None]
        origins = [slot for slot in range(remaining, self.active) if self.held[slot] is not None]
        for origin, target in zip(origins, targets, strict=True):
            self.held[target], self.closing[target] = self.held[origin], self.closing[origin]
        del self.held[remaining:], self.closing[remaining:]
        self._host_position[targets] = self._host_position[origins]
        moves = to_device(torch.tensor([origins, targets], dtype=torch.int64), self.state.device)
        self.state[:, moves[1]] = self.state[:, moves[0]]
        self.state[:, remaining:before] = self._idle
        return moves[0], moves[1]
