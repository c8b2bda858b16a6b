"""The last block of a stack and the final norm, run only where their output is read.

PPO reads the final states that predict response tokens. At the prompt's other positions the last
block owes nothing but keys and values, so its attention, its output projection and its feed-forward
layer are left out there: three quarters of its products.

The block stays the library's, and is called twice: over all positions, left as soon as it hands
keys and values to its cache; then over the positions that are read, where the cache answers with
those of all.

B rows, S tokens, T positions read, H key-value heads, E width of a head, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rlhf_exp.models.families import TESTED
from rlhf_exp.models.masks import as_mask


class TopBlock:
    """One block and the final norm, at chosen positions.

    Not an `nn.Module`: its parameters belong to the model that it is a slice of.

    Args:
        base: a model of the block and the norm alone, fed with states.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base

    @property
    def usable(self) -> bool:
        """Whether the block is known to work so: its attention takes masks and is not sliding."""
        config = self._base.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        masked = config._attn_implementation in ("eager", "sdpa")
        return masked and kinds[-1] == "full_attention" and config.model_type in TESTED

    def __call__(self, states: Tensor, read: Tensor) -> Tensor:
        """Return the final states [B, T, D] at positions `read`.

        Args:
            states: [B, S, D] entering the block, right-padded.
            read: [B, T] int64, each below S.
        """
        columns = torch.arange(states.shape[1], device=states.device)
        cache = _KeysAndValues()
        try:
            # The mask is not looked at before the block is left; one of four dimensions is not
            # turned into another.
            unused = columns.new_ones(1, 1, 1, 1, dtype=torch.bool)
            self._run(states, columns.expand(states.shape[:2]), unused, cache)
        except _Made:
            pass
        else:
            raise AssertionError(f"{self._base.config.model_type}: no keys went to the cache")
        index = read.unsqueeze(2).expand(-1, -1, states.shape[2])
        eager = self._base.config._attn_implementation == "eager"
        mask = as_mask(columns <= read[:, None, :, None], states.dtype if eager else torch.bool)
        return self._run(states.gather(1, index), read, mask, cache)

    def _run(self, states: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        return self._base(
            inputs_embeds=states,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _Made(Exception):
    """A block has handed over its keys and values."""


class _KeysAndValues(Cache):
    """The keys and values [B, H, S, E] of one block: taken once, given from then on."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._held: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401 - the library's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take what a block makes of all positions, and leave it; or answer with that."""
        if self._held is None:
            self._held = key_states, value_states
            raise _Made
        return self._held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given."""
        return 0
