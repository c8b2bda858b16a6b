"""A key-value cache of slots, in which every row has its own length.

Which tokens a token attends to (all earlier ones, a sliding window, its chunk) is the model's own
matter: the library has a function of two positions for each kind of layer. While the next token of
each row is decoded, that function is asked at each row's own position.

A active slots, N rows, W tokens a slot has room for, H key-value heads, Q queries of a row, K keys,
E width of a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import to_attention_mask
from rlhf_exp.models.pretrained import half_on_host


class SlotCache(Cache):
    """A key-value cache of slots, allocated once, in which every row has its own length.

    Rows stand in their slots without padding on the left: slot column = position. So a row can join
    while others are half done, and leave without the others being moved. The library's own caches
    grow by concatenation (a copy of everything at every token) or hold all rows at one length.

    A forward pass runs in one of the contexts `prefilling` and `stepping`.

    Args:
        model: the model without its head.
        slots: rows held at the same time.
        width: tokens a slot has room for.

    Raises:
        UserError: the model's blocks keep other things than keys and values.
    """

    lockstep = False
    """Whether all rows have to be at one position."""

    def __init__(self, model: PreTrainedModel, slots: int, width: int) -> None:
        config = model.config.get_text_config()
        if _keeps_states(model, config):
            raise UserError(
                f"a {config.model_type!r} model cannot be sampled from with model.cache=slots: its "
                "blocks keep states beside keys and values; set model.cache=library"
            )
        layers = config.num_hidden_layers
        numbers = torch.arange(slots, device=model.device)
        self._write_position = WritePosition(slots, width, numbers, numbers[:0])
        # There attention is a product over all of a slot, whose memory must be in one piece.
        self._whole_slots = half_on_host(model)
        super().__init__(layers=[SlotLayer(self._write_position) for _ in range(layers)])

    @contextmanager
    def prefilling(self, positions: Tensor, slots: slice) -> Iterator[dict[str, Any]]:
        """Store prompts, right-padded, in `slots`; yield the model's arguments besides the tokens.

        Args:
            positions: [N, P] int64, of the tokens.
            slots: N slots.
        """
        self._write_position.prefill = slots
        # Padding is on the right, where a causal mask lets no real token see it.
        yield {"past_key_values": self, "position_ids": positions}

    @contextmanager
    def stepping(self, positions: Tensor, longest: int) -> Iterator[dict[str, Any]]:
        """Store a token of each of the first A slots; yield the arguments besides the tokens.

        Args:
            positions: [A] int64, of these tokens.
            longest: number of columns that attention reads; above every position.
        """
        write = self._write_position
        write.prefill, write.positions = None, positions
        write.longest = write.width if self._whole_slots else longest
        token = _query_positions.set(positions)
        try:
            yield {"past_key_values": self, "position_ids": positions.unsqueeze(1)}
        finally:
            _query_positions.reset(token)

    def keep(self, output: Any) -> None:  # noqa: ANN401 - one of the library's outputs
        """Take the model's output, which holds nothing but this cache."""

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy the first `longest` columns of slots `origins` [N] to `targets` [N], all layers."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.move(origins, targets, longest)


def _keeps_states(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Return whether blocks keep something besides the keys and values of tokens."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return True
    # Before transformers 5.23 there is no layer that keeps nothing.
    empty = getattr(cache_utils, "DummyLayer", DynamicLayer)
    plain = (DynamicLayer, DynamicSlidingWindowLayer, empty)
    return any(type(layer) not in plain for layer in DynamicCache(config=config).layers)


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, W, E] of one layer.

    It holds the write position and not the cache: a reference back to the cache would keep hundreds
    of megabytes alive until the next collection of cycles.
    """

    is_sliding = False

    def __init__(self, write_position: WritePosition) -> None:
        super().__init__()
        self._write_position = write_position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: masked keys and values must be finite.

        In the type that attention computes in: mixed precision hands over keys in float32, rotated
        in it, which attention would round at every token.
        """
        slots, width = self._write_position.slots, self._write_position.width
        device = key_states.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            zeros = states.new_zeros(slots, heads, width, size, dtype=half)
            setattr(self, name, zeros)

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
        write = self._write_position
        if write.prefill is not None:
            length = key_states.shape[2]
            self.keys[write.prefill, :, :length] = key_states
            self.values[write.prefill, :, :length] = value_states
            return key_states, value_states
        active = write.positions.shape[0]
        numbers = write.slot_numbers[:active]
        self.keys[numbers, :, write.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[numbers, :, write.positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:active, :, : write.longest], self.values[:active, :, : write.longest]

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy the first `longest` columns of slots `origins` [N] to slots `targets` [N]."""
        for states in (self.keys, self.values):
            if states is not None:  # some families have blocks that read another's keys and values
                states[targets, :, :longest] = states[origins, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and first position of the keys that `update` returns."""
        write = self._write_position
        return (query_length if write.prefill is not None else write.longest), 0

    def get_seq_length(self) -> int:
        """Return 0: positions are given explicitly, and prompts start at 0."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of tokens a slot has room for."""
        return self._write_position.width


@dataclass
class WritePosition:
    """Position of the next keys and values: one object that all layers of a cache read.

    Attributes:
        slots: rows held at the same time.
        width: W, tokens a slot has room for.
        slot_numbers: [slots] int64, counting from 0.
        positions: [A] int64, column of the next token of each active slot.
        prefill: the slots that the next forward pass fills from column 0, or None.
        longest: number of columns that attention reads; above every position.
    """

    slots: int
    width: int
    slot_numbers: Tensor
    positions: Tensor
    prefill: slice | None = None
    longest: int = 0


_query_positions: ContextVar[Tensor | None] = ContextVar("query positions", default=None)
"""Positions [A] of the tokens that are decoded, one of each row; None outside of `stepping`."""


def _at_query_positions(library_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Return `library_mask`, which within `SlotCache.stepping` goes by each row's own position.

    The library's masks know one position for all rows of a batch.
    """

    @functools.wraps(library_mask)
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:  # noqa: ANN401 - the library's
        positions = _query_positions.get()
        if positions is None:
            return library_mask(*args, **kwargs)
        rows = torch.arange(len(positions), device=positions.device)
        columns = torch.arange(kwargs["kv_length"], device=positions.device)
        # [A, 1, 1, K], by broadcasting as in the library: row, head, query, key.
        allowed = kwargs["mask_function"](
            rows[:, None, None, None], rows[:1], positions[:, None, None, None], columns
        )
        dtype = kwargs["dtype"] if library_mask is _EAGER else torch.bool
        return to_attention_mask(allowed, dtype)

    return mask


_EAGER = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
for _name in ("eager", "sdpa"):
    ALL_MASK_ATTENTION_FUNCTIONS[_name] = _at_query_positions(ALL_MASK_ATTENTION_FUNCTIONS[_name])
