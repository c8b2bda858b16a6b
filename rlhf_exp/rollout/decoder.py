"""One forward at a time of a cached causal language model: whole prompts, or one token a slot.

Dimensions: N prompts, P tokens of the longest, A active slots, V vocabulary, D width.

The model is a Hugging Face model as it is. Its decoder is called below its language-model head, so
that logits are made of last positions only, with explicit positions and, when decoding, an explicit
mask: nothing has to be inferred from padding.

A key-value cache of slots: one row a slot, allocated once, every row at its own length.

Dimensions: A active slots, H key-value heads, W tokens a slot has room for, E width of a head.

Rows stand in their slots without padding on the left: slot column = position. So a row can join
while others are half done, and leave without the others being moved. The library's own caches grow
by concatenation (a copy of everything at every token) or hold all rows at one length.

Which row sits in which slot, on the host and on the device.

The active slots are the first ones. A slot whose row has ended runs on until it is cleared away:
its position and column stop at the last one, and what it writes meanwhile is cut off in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_exp.algo.logprobs import head_logits, product_dtype
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import as_mask


class Decoder:
    """A model with a cache of slots.

    Args:
        model: the causal language model, in evaluation mode.
        slots: rows decoded at the same time.
        width: tokens a row can come to.
        capture: module of `model` whose incoming hidden states are wanted, or None.

    Attributes:
        captured: what entered `capture` in the last forward, [N, P, D] or [A, 1, D].
    """

    def __init__(
        self, model: PreTrainedModel, slots: int, width: int, capture: nn.Module | None
    ) -> None:
        self.captured: Tensor | None = None
        self._model = model
        self._embedding = model.get_input_embeddings()
        self._head = _Head(model.get_output_embeddings())
        self._additive_mask = model.config._attn_implementation == "eager"
        device = model.device
        layers = model.config.get_text_config().num_hidden_layers
        self._cache = SlotCache(layers, slots, width, device)
        self._columns = torch.arange(width, device=device)
        self._capture = capture

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Keep the states entering `capture` while the context lasts."""
        if self._capture is None:
            yield
            return
        handle = self._capture.register_forward_pre_hook(self._take, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def prefill(self, tokens: Tensor, lengths: Tensor, slots: slice, scale: float) -> Tensor:
        """Read prompts into `slots` and return the logits [N, V] after each, times `scale`.

        Args:
            tokens: [N, P] int64, right-padded.
            lengths: [N] int64.
            slots: of N rows.
            scale: one over the temperature.
        """
        self._cache.place.prefill = slots
        positions = self._columns[: tokens.shape[1]].expand(tokens.shape)
        # Padding stands to the right, where a causal mask lets no real token see it.
        hidden = self._forward(tokens, positions, None)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self._head(hidden[rows, lengths - 1], scale)

    def step(self, tokens: Tensor, positions: Tensor, longest: int, scale: float) -> Tensor:
        """Feed one token to each of the first A slots and return the logits [A, V], times `scale`.

        Args:
            tokens: [A] int64.
            positions: [A] int64, of these tokens.
            longest: columns to attend to: above every position.
            scale: one over the temperature.
        """
        place = self._cache.place
        place.prefill, place.positions, place.longest = None, positions, longest
        mask = (self._columns[:longest] <= positions.unsqueeze(1))[:, None, None]
        hidden = self._forward(tokens.unsqueeze(1), positions.unsqueeze(1), mask)
        return self._head(hidden[:, 0], scale)

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy what slots `origins` [N] hold, up to `longest` columns, to slots `targets` [N]."""
        self._cache.move(origins, targets, longest)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        embedded = self._embedding(tokens)
        if mask is not None and self._additive_mask:
            mask = as_mask(mask, embedded.dtype)
        return self._model.base_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.captured = args[0] if args else kwargs["hidden_states"]


class _Head:
    """The language-model head, with float32 logits whatever the type of its weights."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module.weight, Tensor), f"no linear head: {type(module).__name__}"
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
            return head_logits(hidden.to(self._cast.dtype), self._cast, self._bias, scale)


@contextmanager
def ready_to_decode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout (and with it gradient checkpointing) off, and attention to one that masks.

    Raises:
        UserError: for an attention that takes no mask in a model that has no other.
    """
    config = model.config
    attention = config._attn_implementation
    usable = attention in ("eager", "sdpa")
    if not usable and not getattr(model, "_supports_sdpa", False):
        raise UserError(
            f"model.attention: sampling from {type(model).__name__} needs 'eager', found "
            f"{attention!r}; set model.attention=eager"
        )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if not usable:
            config._attn_implementation = "sdpa"
        yield
    finally:
        if not usable:
            config._attn_implementation = attention
        for module, training in modes:
            module.training = training


@dataclass
class WritePosition:
    """Where the next keys and values go: one object that all layers of a cache read.

    Attributes:
        slots: rows held at the same time.
        width: tokens a slot has room for.
        slot_numbers: [slots] int64, counting from 0.
        positions: [A] int64, column of the next token of each active slot.
        prefill: the slots that the next forward fills from column 0, or None.
        longest: columns that attention reads, above every position.
    """

    slots: int
    width: int
    slot_numbers: Tensor
    positions: Tensor
    prefill: slice | None = None
    longest: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, W, E] of one layer.

    It knows the place and not the cache: a reference back to the cache would keep hundreds of
    megabytes alive until the next collection of cycles.
    """

    is_sliding = False

    def __init__(self, place: WritePosition) -> None:
        super().__init__()
        self._place = place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: what is masked out must be finite."""
        slots, width = self._place.slots, self._place.width
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            setattr(self, name, states.new_zeros(slots, heads, width, size))

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - the library's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Store [A, H, Q, E]: whole prompts (returned as they are), or the next token of each."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place = self._place
        if place.prefill is not None:
            length = key_states.shape[2]
            self.keys[place.prefill, :, :length] = key_states
            self.values[place.prefill, :, :length] = value_states
            return key_states, value_states
        active = place.positions.shape[0]
        self.keys[place.slot_numbers[:active], :, place.positions] = key_states[:, :, 0]
        self.values[place.slot_numbers[:active], :, place.positions] = value_states[:, :, 0]
        return self.keys[:active, :, : place.longest], self.values[:active, :, : place.longest]

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy slots `origins` [N] onto `targets` [N], as far as `longest` columns."""
        for states in (self.keys, self.values):
            assert states is not None
            states[targets, :, :longest] = states[origins, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a causal mask over whole prompts needs; decoding brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are given explicitly, and prompts start at 0."""
        return 0

    def get_max_length(self) -> int:
        """Return the room of a slot."""
        return self._place.width


class SlotCache(Cache):
    """The layers' slots, and where the next tokens go.

    Set `place.prefill` to a slice of slots before a forward over whole prompts; set it to None,
    `place.positions` and `place.longest` before a forward over the next token of the first A slots.

    Args:
        layers: number of decoder layers.
        slots: rows held at the same time.
        width: tokens a slot has room for.
        device: of the model.
    """

    def __init__(self, layers: int, slots: int, width: int, device: torch.device) -> None:
        numbers = torch.arange(slots, device=device)
        self.place = WritePosition(slots, width, numbers, numbers[:0])
        super().__init__(layers=[SlotLayer(self.place) for _ in range(layers)])

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy slots `origins` [N] onto `targets` [N] in every layer, `longest` columns of them."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.move(origins, targets, longest)


class SlotTable:
    """The slots of one sampling call.

    Args:
        slots: how many there are.
        max_new_tokens: T, a response's length at most.
        device: of the model.
        spare: positions that a row may run on to after its last token.

    Attributes:
        slots: how many there are.
        held: row in each active slot, or None where it has ended.
        row: [slots] int64, the same on the device, an ended row included.
        token: [slots] int64, to feed next.
        position: [slots] int64, of that token; before the first one, that of the prompt's end.
        column: [slots] int64, number of the response token to draw next; T once all are drawn.
        closing: of each active slot, how many tokens are still fed to a row that has ended.
    """

    def __init__(
        self, slots: int, max_new_tokens: int, device: torch.device, spare: int = 0
    ) -> None:
        self.held: list[int | None] = []
        self.closing: list[int] = []
        self.slots = slots
        self._max_new_tokens, self._spare = max_new_tokens, spare
        self._state = torch.zeros(7, slots, dtype=torch.int64, device=device)
        self.row, self.token, self.position, self.column, _, _, self._shift = self._state
        self._moving, self._limits = self._state[2:4], self._state[4:6]
        self._host_position = np.zeros(slots, dtype=np.int64)

    @property
    def active(self) -> int:
        """Slots that take part in a forward, those of ended rows included."""
        return len(self.held)

    @property
    def ended(self) -> int:
        """Active slots whose row has ended."""
        return self.held.count(None)

    @property
    def free(self) -> int:
        """Slots that are not active."""
        return self.slots - len(self.held)

    @property
    def longest(self) -> int:
        """Columns in use: above the position of every active slot."""
        return int(self._host_position[: self.active].max()) + 1

    def fill(self, rows: Sequence[int], prompt_lengths: Sequence[int]) -> slice:
        """Give each of `rows` a slot and return these slots."""
        slots = slice(self.active, self.active + len(rows))
        self.held.extend(rows)
        self.closing.extend([0] * len(rows))
        ends = np.asarray(prompt_lengths, dtype=np.int64) - 1
        zeros = np.zeros_like(ends)
        last_column = zeros + self._max_new_tokens
        last_position = ends + last_column + self._spare
        values = np.stack([np.asarray(rows), zeros, ends, zeros, last_position, last_column, zeros])
        self._state[:, slots] = torch.from_numpy(values).to(self._state.device)
        self._host_position[slots] = ends
        return slots

    def advance(self, slots: slice, tokens: Tensor) -> None:
        """Take the tokens drawn for `slots` as the next ones to feed."""
        self.token[slots] = tokens
        moving = self._moving[:, slots]
        torch.minimum(moving.add_(1), self._limits[:, slots], out=moving)
        self._host_position[slots] += 1

    def feed(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        more: int,
        kept: int | None = None,
    ) -> None:
        """Let the rows in `slots`, which have ended, be fed one token more.

        Args:
            slots: N of the active ones.
            tokens: N, to feed them.
            positions: N, of these in their rows.
            more: how many are still fed to these rows, this one included.
            kept: the column that the states of this one are kept in, and of none that follows;
                as always, if not given.
        """
        for slot, position in zip(slots, positions, strict=True):
            self.closing[slot] = more
            self._host_position[slot] = position
        values = torch.tensor([slots, tokens, positions], dtype=torch.int64)
        at, tokens_at, positions_at = values.to(self._state.device)
        self.token[at] = tokens_at
        self.position[at] = positions_at
        if kept is not None:
            self._shift[at] = kept - positions_at

    def fed(self) -> list[int]:
        """Count the token fed to each closing row; let those go that are fed no more.

        Returns:
            The slots of rows that are fed more.
        """
        for slot, more in enumerate(self.closing):
            if more:
                self.closing[slot] = more - 1
                if more == 1:
                    self.held[slot] = None
        return [slot for slot, more in enumerate(self.closing) if more]

    def kept_at(self, kept: int) -> Tensor:
        """Return the columns [A] that the states of the tokens fed next are kept in.

        Args:
            kept: as in `feed`; the next column takes what nobody reads.
        """
        active = slice(0, self.active)
        return (self.position[active] + self._shift[active]).clamp_(max=kept + 1)

    def clear(self) -> tuple[Tensor, Tensor]:
        """Fill the slots of ended rows with the last active ones.

        Returns:
            Slots to copy from and slots to copy to, [N] int64 each, for what else slots hold.
        """
        remaining = self.active - self.ended
        targets = [slot for slot in range(remaining) if self.held[slot] is None]
        origins = [slot for slot in range(remaining, self.active) if self.held[slot] is not None]
        for origin, target in zip(origins, targets, strict=True):
            self.held[target], self.closing[target] = self.held[origin], self.closing[origin]
        del self.held[remaining:], self.closing[remaining:]
        self._host_position[targets] = self._host_position[origins]
        moves = torch.tensor([origins, targets], dtype=torch.int64).to(self._state.device)
        self._state[:, moves[1]] = self._state[:, moves[0]]
        return moves[0], moves[1]
