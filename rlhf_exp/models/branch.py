"""A slice of a model's blocks as a model of its own: the frozen trunk, and the branch above it.

With only the top k blocks training, the hidden state that enters them never changes for a given
token, so it is computed once (`Trunk`) and every later pass runs k blocks (`Branch`). Both are
built as the *same* transformers class with fewer layers, into which the model's own modules are
put: masks, rotary positions and attention stay the library's.

B rows, S tokens, D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models.families import TESTED, DecoderParts, decoder_parts
from rlhf_exp.models.top import TopBlock


class Trunk:
    """The blocks below a cut, with the embeddings; shares the model's modules and never trains.

    Not an `nn.Module`: its parameters belong to the model.
    """

    def __init__(self, model: PreTrainedModel, cut: int) -> None:
        """Take the blocks of `model` below block `cut`."""
        parts = decoder_parts(model)
        self._base = _slice(parts, slice(0, cut))
        setattr(self._base, parts.norm_name, nn.Identity())
        self._base.set_input_embeddings(parts.embedding)
        if parts.positions is not None:
            setattr(self._base, parts.positions, getattr(parts.base, parts.positions))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the states [B, S, D] that enter block `cut`, for right-padded `tokens` [B, S]."""
        return self._base(input_ids=tokens, use_cache=False).last_hidden_state


class Branch:
    """The top blocks and the final norm, fed with the states that enter them.

    Not an `nn.Module`: a shared branch's parameters belong to the model. Who trains a copy
    registers its `module`.
    """

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        """Use `Branch.of`."""
        self._base = base
        embedding = cast(nn.Embedding, base.get_input_embeddings())
        own = replace(parts, base=base, embedding=embedding, head=None)
        count = len(own.blocks)
        self._lower = None if count == 1 else _slice(own, slice(0, count - 1))
        if self._lower is not None:
            setattr(self._lower, parts.norm_name, nn.Identity())
        top = base if count == 1 else _slice(own, slice(count - 1, count))
        setattr(top, parts.norm_name, own.norm)
        self._top = TopBlock(top)

    @property
    def module(self) -> PreTrainedModel:
        """The blocks and the norm."""
        return self._base

    @classmethod
    def of(cls, model: PreTrainedModel, k: int, share: bool) -> Branch:
        """Build the branch of the top `k` blocks of `model`.

        Args:
            model: with or without a head.
            k: number of blocks, 0 < k <= the model's.
            share: whether the branch is made of the model's own modules, or of a frozen copy.
        """
        parts = decoder_parts(model)
        count = len(parts.blocks)
        if not 0 < k <= count:
            raise UserError(
                f"train_blocks={k}: the model has {count} blocks; give a number from 1 to {count}"
            )
        base = _slice(parts, slice(count - k, count))
        setattr(base, parts.norm_name, parts.norm)
        base.set_input_embeddings(nn.Identity())  # never called: the input is states
        if parts.positions is not None:
            setattr(base, parts.positions, _NoPositions())
        if not share:
            base = copy.deepcopy(base).requires_grad_(False).eval()
        return cls(base, parts)

    def __call__(self, states: Tensor) -> Tensor:
        """Return the hidden states [B, S, D] after the final norm.

        Args:
            states: [B, S, D] entering the first of the blocks, right-padded.
        """
        return self._base(inputs_embeds=states, use_cache=False).last_hidden_state

    @property
    def reads(self) -> bool:
        """Whether `read` can do without the whole of the last block."""
        return self._top.usable

    def read(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return what `self(states)` has at some positions, for less.

        Args:
            states: [B, S, D] entering the first of the blocks, right-padded.
            positions: [B, T] int64, each below S.

        Returns:
            [B, T, D].
        """
        if self._lower is not None:
            states = self._lower(inputs_embeds=states, use_cache=False).last_hidden_state
        return self._top(states, positions)

    def to(self, device: torch.device | str) -> Branch:
        """Move a copy to `device` (a shared branch goes where its model goes)."""
        nn.Module.to(self._base, device)
        return self


def check_branch(model: PreTrainedModel, cut: int) -> None:
    """Compare trunk and branch with the whole model, for a family that the tests do not cover.

    Some families scale their embeddings or logits in ways their structure does not show.

    Raises:
        UserError: the two differ.
    """
    parts = decoder_parts(model)
    if parts.base.config.model_type in TESTED:
        return
    device = parts.embedding.weight.device
    tokens = torch.arange(8, device=device).remainder(parts.embedding.num_embeddings)[None]
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        states = Trunk(model, cut)(tokens)
        hidden = Branch.of(model, len(parts.blocks) - cut, share=True)(states)
        assert parts.head is not None
        error = (parts.head(hidden) - whole).abs().max().item()
        scale = whole.abs().max().item()
    if not error <= 0.02 * scale:
        raise UserError(
            f"train_blocks: a {parts.base.config.model_type!r} model cannot be cut below its top "
            f"blocks (logits differ by {error:.3g}); train every block (train_blocks=null) or "
            "use LoRA"
        )


class _NoPositions(nn.Module):
    """Stands for the table of learned positions where the states already hold them."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return 0, whatever the positions."""
        return torch.zeros((), device=position_ids.device)


def _slice(parts: DecoderParts, which: slice) -> PreTrainedModel:
    """Return a model of the base's class made of the blocks `which`.

    Its embeddings are for the caller to set; its norm is the base's.
    """
    config = copy.deepcopy(parts.base.config)
    blocks = list(parts.blocks)[which]
    # Kept before the count changes: some families check that the two agree.
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(kinds)[which]
    config.num_hidden_layers = len(blocks)
    with torch.device("meta"):
        base = type(parts.base)(config)
    base.train(parts.base.training)
    setattr(base, parts.blocks_name, nn.ModuleList(blocks))
    for name, child in parts.base.named_children():
        if child is not parts.embedding and not isinstance(child, nn.ModuleList | nn.Embedding):
            setattr(base, name, child)
    return base
