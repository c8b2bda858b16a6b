"""One forward at a time of a cached causal language model: whole prompts, or one token a slot.

Dimensions: N prompts, P tokens of the longest, A active slots, V vocabulary, D width.

The model is a Hugging Face model as it is. Its decoder is called below its language-model head, so
that logits are made of last positions only, with explicit positions and, when decoding, an explicit
mask: nothing has to be inferred from padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.logprobs import head_logits, product_dtype
from rlhf_exp.errors import UserError
from rlhf_exp.models.masks import as_mask
from rlhf_exp.rollout.cache import SlotCache


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
