"""A slice of a model's blocks as a model of its own: the frozen trunk, and the branch above it.

With only the top k blocks training, the hidden state that enters them never changes for a given
token, so it is computed once (`Trunk`) and every later pass runs k blocks (`Branch`). Both are
built as the *same* transformers class with fewer layers, into which the model's own modules are
put: masks, rotary positions and attention stay the library's.

B rows, S tokens, D width.

The last block of a stack and the final norm, run only where their output is read.

PPO reads the final states that predict response tokens. At the prompt's other positions the last
block owes nothing but keys and values, so its attention, its output projection and its feed-forward
layer are left out there: three quarters of its products.

The block stays the library's, and is called twice: over all positions, left as soon as it hands
keys and values to its cache; then over the positions that are read, where the cache answers with
those of all.

B rows, S tokens, T positions read, H key-value heads, E width of a head, D width.

The parts of a decoder-only transformer, found by structure and not by family.

What is recognised: a base model whose direct children are token embeddings, at most one table of
learned positions, dropouts, rotary embeddings (no parameters), one list of blocks and one final
norm; around it a linear head. That holds for GPT-2, GPT-J, GPT-NeoX, Llama, Qwen2 and Qwen3.

Attention masks in the form that a model's attention takes.
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
        self._top = LastBlock(top)

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


class LastBlock:
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


# Families whose trunk and branch are checked against the whole model in the project's tests.
TESTED = frozenset({"gpt2", "gptj", "gpt_neox", "llama", "qwen2", "qwen3"})


@dataclass(frozen=True)
class DecoderParts:
    """Where things are in a model.

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

    Raises:
        UserError: the model is built otherwise than described above.
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
        raise UserError(
            f"a {base.config.model_type!r} model is not built as one stack of blocks between "
            f"embeddings and a final norm (blocks: {blocks}, norms: {norms}, position tables: "
            f"{positions}, other parts: {unknown}); known to work: {', '.join(sorted(TESTED))}"
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


def as_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of which position may see which.

    Args:
        allowed: [..., Q, K] bool; each of Q sees at least one of K.
        dtype: `torch.bool` for scaled-dot-product attention; for eager attention, which adds its
            mask, the float type of its scores: 0 where allowed, else the type's least value.
    """
    if dtype == torch.bool:
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)
