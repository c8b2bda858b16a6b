"""A key-value cache of slots: one row a slot, allocated once, every row at its own length.

Dimensions: A active slots, H key-value heads, W tokens a slot has room for, E width of a head.

Rows stand in their slots without padding on the left: slot column = position. So a row can join
while others are half done, and leave without the others being moved. The library's own caches grow
by concatenation (a copy of everything at every token) or hold all rows at one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Place:
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

    def __init__(self, place: Place) -> None:
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
        self.place = Place(slots, width, numbers, numbers[:0])
        super().__init__(layers=[SlotLayer(self.place) for _ in range(layers)])

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy slots `origins` [N] onto `targets` [N] in every layer, `longest` columns of them."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.move(origins, targets, longest)
