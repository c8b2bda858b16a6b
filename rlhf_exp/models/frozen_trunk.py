"""The frozen trunk of a model and the branch of training blocks above it, as models of their own.

With only the top k blocks training, the hidden state that enters them never changes for a given
token, so it is computed once (`Trunk`) and every later pass runs k blocks (`Branch`). Both are
built as the *same* transformers class with fewer layers, into which the model's own modules are
put: masks, rotary positions and attention stay the library's. Where only some positions of the
output are read, the last block is run for these alone (`LastBlock`).

B rows, S tokens, T positions read, H key-value heads, E width of a head, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rlhf_exp.errors import UserError

TESTED_FAMILIES = frozenset({"gpt2", "gptj", "gpt_neox", "llama", "qwen2", "qwen3"})
"""Families whose trunk and branch the tests compare with the full model."""


class Trunk:
    """The lowest blocks of a model with its embeddings, as modules shared with it; never trains.

    Not an `nn.Module`: its parameters belong to the model.
    """

    def __init__(self, model: PreTrainedModel, frozen_blocks: int) -> None:
        """Take the lowest `frozen_blocks` blocks of `model`."""
        parts = decoder_parts(model)
        self._base = _slice(parts, slice(0, frozen_blocks))
        setattr(self._base, parts.norm_name, nn.Identity())
        self._base.set_input_embeddings(parts.embedding)
        if parts.positions is not None:
            setattr(self._base, parts.positions, getattr(parts.base, parts.positions))

    @property
    def module(self) -> PreTrainedModel:
        """The embeddings and the blocks, as a model without its final norm."""
        return self._base

    @torch.no_grad()
    def __call__(self, tokens: Tensor, **packed: Any) -> Tensor:  # noqa: ANN401 - the model's own
        """Return the states [B, S, D] that leave the trunk.

        Args:
            tokens: [B, S] int64, right-padded.
            packed: what the model is called with for packed rows, see `packed_inputs`.
        """
        return self._base(input_ids=tokens, use_cache=False, **packed).last_hidden_state


class Branch:
    """The top blocks and the final norm, fed with the states that enter them.

    Not an `nn.Module`: a shared branch's parameters belong to the model. To train a copy, register
    its `module`.
    """

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        """Take a model of the blocks alone; `Branch.of` builds it."""
        self._base = base
        self._entry_scale = _entry_scale(parts)
        embedding = cast(nn.Embedding, base.get_input_embeddings())
        branch = replace(parts, base=base, embedding=embedding, head=None)
        count = len(branch.blocks)
        self._lower = None if count == 1 else _slice(branch, slice(0, count - 1))
        if self._lower is not None:
            setattr(self._lower, parts.norm_name, nn.Identity())
        last = base if count == 1 else _slice(branch, slice(count - 1, count))
        setattr(last, parts.norm_name, branch.norm)
        self._last = LastBlock(last)

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

        Raises:
            UserError: the model has fewer blocks.
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

    def __call__(self, states: Tensor, **packed: Any) -> Tensor:  # noqa: ANN401 - the model's own
        """Return the hidden states [B, S, D] after the final norm.

        Args:
            states: [B, S, D] entering the first of the blocks, right-padded.
            packed: what the model is called with for packed rows, see `packed_inputs`.
        """
        return self._run(self._base, states, **packed)

    @property
    def supports_forward_at(self) -> bool:
        """Whether `forward_at` is known to be right for this model (see `LastBlock.supported`)."""
        return self._last.supported

    def forward_at(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return `self(states)` at some positions, without the last block's work at the others.

        Args:
            states: [B, S, D] entering the first of the blocks, right-padded.
            positions: [B, T] int64, each below S.

        Returns:
            [B, T, D].
        """
        if self._lower is not None:
            states = self._run(self._lower, states)
        return self._last(states, positions)

    def _run(self, base: PreTrainedModel, states: Tensor, **packed: Any) -> Tensor:  # noqa: ANN401
        if self._entry_scale != 1.0:
            states = states / self._entry_scale
        return base(inputs_embeds=states, use_cache=False, **packed).last_hidden_state

    def to(self, device: torch.device | str) -> Branch:
        """Move a copy to `device` (a shared branch goes where its model goes)."""
        nn.Module.to(self._base, device)
        return self


def check_branch(model: PreTrainedModel, frozen_blocks: int) -> None:
    """Compare trunk and branch with the full model, for a family that the tests do not cover.

    A family may do between its blocks what their list does not show.

    Args:
        model: a causal language model.
        frozen_blocks: number of blocks in the trunk.

    Raises:
        UserError: final states differ by more than rounding.
    """
    parts = decoder_parts(model)
    kind = parts.base.config.model_type
    if kind in TESTED_FAMILIES:
        return
    embedding = parts.embedding
    tokens = torch.randint(
        embedding.num_embeddings, (1, 16), generator=torch.Generator().manual_seed(0)
    ).to(embedding.weight.device)
    problem = ""
    try:
        with torch.no_grad():
            expected = parts.base(input_ids=tokens, use_cache=False).last_hidden_state
            states = Trunk(model, frozen_blocks)(tokens)
            found = Branch.of(model, len(parts.blocks) - frozen_blocks, share=True)(states)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        # The operations are the same; but for a factor at the entry, so are their results.
        if not error <= min(100 * torch.finfo(expected.dtype).eps, 0.05):
            problem = f"final states differ by {error:.2g} of the largest"
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as failure:
        problem = str(failure).strip().splitlines()[0] if str(failure).strip() else repr(failure)
    if problem:
        raise UserError(
            f"train_blocks: a {kind!r} model cannot be cut below its top blocks ({problem}); "
            "train every block (train_blocks=null)"
        )


class LastBlock:
    """The last block and the final norm, run only at the positions whose output is read.

    PPO reads the final states that predict response tokens. At the prompt's other positions the
    last block is needed for nothing but keys and values, so its attention, its output projection
    and its feed-forward layer are left out there: three quarters of its products.

    The block stays the library's, and is called twice: over all positions, stopped as soon as it
    hands keys and values to its cache; then over the positions that are read, where the cache
    answers with the keys and values of all.

    Not an `nn.Module`: its parameters belong to the model that it is a slice of.

    Args:
        base: a model of the block and the norm alone, fed with states.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base

    @property
    def supported(self) -> bool:
        """Whether this is tested for the family, and attention takes masks and is not sliding."""
        config = self._base.config
        layer_types = getattr(config, "layer_types", None) or ["full_attention"]
        masked = config._attn_implementation in ("eager", "sdpa")
        return (
            masked and layer_types[-1] == "full_attention" and config.model_type in TESTED_FAMILIES
        )

    def __call__(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return the final states [B, T, D] at `positions`.

        Args:
            states: [B, S, D] entering the block, right-padded.
            positions: [B, T] int64, each below S.
        """
        columns = torch.arange(states.shape[1], device=states.device)
        cache = _KeysAndValues()
        try:
            # No mask is read before the block is stopped; one of four dimensions is passed on as
            # it is, instead of being expanded.
            unused = columns.new_ones(1, 1, 1, 1, dtype=torch.bool)
            self._run(states, columns.expand(states.shape[:2]), unused, cache)
        except _BlockStopped:
            pass
        else:
            raise AssertionError(f"{self._base.config.model_type}: no keys went to the cache")
        index = positions.unsqueeze(2).expand(-1, -1, states.shape[2])
        eager = self._base.config._attn_implementation == "eager"
        mask = to_attention_mask(
            columns <= positions[:, None, :, None], states.dtype if eager else torch.bool
        )
        return self._run(states.gather(1, index), positions, mask, cache)

    def _run(self, states: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        return self._base(
            inputs_embeds=states,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _BlockStopped(Exception):
    """The block has handed its keys and values to the cache."""


class _KeysAndValues(Cache):
    """The keys and values [B, H, S, E] of one block, recorded in its first call."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._recorded: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401 - the library's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Record the keys and values of all positions and stop the block; then return them."""
        if self._recorded is None:
            self._recorded = key_states, value_states
            raise _BlockStopped
        return self._recorded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are passed explicitly."""
        return 0


class _NoPositions(nn.Module):
    """Replaces the table of learned positions, which entering states already contain."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return 0, whatever the positions."""
        return torch.zeros((), device=position_ids.device)


def _slice(parts: DecoderParts, selected: slice) -> PreTrainedModel:
    """Return a model of the base's class made of the `selected` blocks.

    Its embeddings are for the caller to set; its norm is the base's.
    """
    config = copy.deepcopy(parts.base.config)
    blocks = list(parts.blocks)[selected]
    # Set before the count changes: some families check that the two agree.
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        config.layer_types = list(layer_types)[selected]
    config.num_hidden_layers = len(blocks)
    with torch.device("meta"):
        base = type(parts.base)(config)
    base.train(parts.base.training)
    setattr(base, parts.blocks_name, nn.ModuleList(blocks))
    for name, child in parts.base.named_children():
        if child is not parts.embedding and not isinstance(child, nn.ModuleList | nn.Embedding):
            setattr(base, name, child)
    return base


@torch.no_grad()
def _entry_scale(parts: DecoderParts) -> float:
    """Return the factor that the model's forward puts on what enters its lowest block.

    Granite multiplies its embeddings there, and a branch would have its states multiplied too.
    """
    if parts.base.config.model_type in TESTED_FAMILIES:
        return 1.0
    base = _slice(parts, slice(0, 0))
    setattr(base, parts.norm_name, nn.Identity())
    base.set_input_embeddings(nn.Identity())
    if parts.positions is not None:
        setattr(base, parts.positions, _NoPositions())
    weight = parts.embedding.weight
    ones = weight.new_ones(1, 1, weight.shape[1])
    return base(inputs_embeds=ones, use_cache=False).last_hidden_state[0, 0, 0].item()


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder-only transformer, and the names they have in it.

    Attributes:
        base: the model without its head; calling it yields hidden states after the final norm.
        embedding: token embeddings, [V, D].
        positions: name in `base` of the table of learned positions, or `None`.
        blocks_name: name in `base` of the list of blocks.
        norm_name: name in `base` of the final norm.
        head: linear layer D -> V, or `None` where `model` is a base model.
    """

    base: PreTrainedModel
    embedding: nn.Embedding
    positions: str | None
    blocks_name: str
    norm_name: str
    head: nn.Linear | None

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, bottom first."""
        return getattr(self.base, self.blocks_name)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return getattr(self.base, self.norm_name)

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return self.head is not None and self.head.weight is self.embedding.weight


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find the parts of `model`, with or without a language-model head.

    They are found by structure, not by family: the base model's direct children must be token
    embeddings, at most one table of learned positions, dropouts, rotary embeddings (no parameters),
    one list of blocks and one final norm; around it a linear head. That holds for GPT-2, GPT-J,
    GPT-NeoX, Llama, Qwen2 and Qwen3.

    Raises:
        UserError: the model is built in another way.
    """
    base = cast(PreTrainedModel, model.base_model)
    embedding = cast(nn.Embedding, base.get_input_embeddings())
    positions, blocks, norms, unknown = [], [], [], []
    for name, child in base.named_children():
        if child is embedding or isinstance(child, nn.Dropout) or not _has_parameters(child):
            continue
        if isinstance(child, nn.ModuleList) and len(child) == base.config.num_hidden_layers:
            blocks.append(name)
        elif isinstance(child, nn.Embedding):
            positions.append(name)
        elif _is_norm(child):
            norms.append(name)
        else:
            unknown.append(f"{name} ({type(child).__name__})")
    if unknown or len(blocks) != 1 or len(norms) != 1 or len(positions) > 1:
        known = ", ".join(sorted(TESTED_FAMILIES))
        raise UserError(
            f"a {base.config.model_type!r} model is not built as one stack of blocks between "
            f"embeddings and a final norm (blocks: {blocks}, norms: {norms}, position tables: "
            f"{positions}, other parts: {unknown}); known to work: {known}"
        )
    head = None if base is model else model.get_output_embeddings()
    if base is not model and not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"a {base.config.model_type!r} model has no linear language-model head")
    return DecoderParts(
        base, embedding, positions[0] if positions else None, blocks[0], norms[0], head
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in module.parameters())


def to_attention_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask in the form that a model's attention takes.

    Args:
        allowed: [..., Q, K] bool: whether query q attends to key k; each query to at least one.
        dtype: `torch.bool` for scaled-dot-product attention; for eager attention, which adds its
            mask, the float type of its scores: 0 where allowed, else the type's least value.
    """
    if dtype == torch.bool:
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)
