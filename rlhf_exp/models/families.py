"""The parts of a decoder-only transformer, found by structure and not by family.

What is recognised: a base model whose direct children are token embeddings, at most one table of
learned positions, dropouts, rotary embeddings (no parameters), one list of blocks and one final
norm; around it a linear head. That holds for GPT-2, GPT-J, GPT-NeoX, Llama, Qwen2 and Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.errors import UserError

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
