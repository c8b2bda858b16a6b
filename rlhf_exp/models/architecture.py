"""The shape of a decoder-only language model, and the parameter counts that follow from it.

Nothing here imports torch: a plan must come back in half a second and needs no weights.
`rlhf_exp.models.pretrained` builds a model from an `Architecture` and reads one out of a config.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

TYPES = ("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """The shape of a causal language model.

    Attributes:
        type: transformers' `model_type`, one of `TYPES`.
        layers: number of blocks.
        width: hidden width D.
        heads: attention heads a block.
        ffn_width: inner width of the feed-forward part.
        vocabulary: rows of the embedding matrix.
        context: the longest sequence, in tokens.
        kv_heads: heads of keys and values; `None` for as many as `heads`.
        tied: whether the head's weight is the embedding's.
        head_width: width of one head; `None` for `width / heads`.
    """

    type: str
    layers: int
    width: int
    heads: int
    ffn_width: int
    vocabulary: int
    context: int
    kv_heads: int | None = None
    tied: bool = False
    head_width: int | None = None

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def width_per_head(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    def differences(self, other: Architecture) -> list[str]:
        """Return one line for each field in which `other` differs."""
        mine, theirs = asdict(self), asdict(other)
        mine.update(kv_heads=self.key_value_heads, head_width=self.width_per_head)
        theirs.update(kv_heads=other.key_value_heads, head_width=other.width_per_head)
        return [
            f"{name}: {mine[name]} against {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class ParameterCount:
    """Number of a model's parameters, by where they are.

    Attributes:
        embedding: token (and learned position) embeddings.
        block: one block.
        blocks: how many blocks.
        norm: the final norm.
        head: parameters that the head adds; the weight of a tied one counts 0.
    """

    embedding: int
    block: int
    blocks: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.block * self.blocks + self.norm + self.head

    @property
    def trunk(self) -> int:
        """All parameters but the head: the part that a reward model uses."""
        return self.total - self.head

    def trainable(self, train_blocks: int | None, tied: bool) -> int:
        """Return the parameters that train with the last `train_blocks` blocks (`None`: all)."""
        if train_blocks is None:
            return self.total
        return min(train_blocks, self.blocks) * self.block + self.norm + (0 if tied else self.head)


def linear_shapes(architecture: Architecture) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of each linear layer of one block."""
    shape = architecture
    width, inner = shape.width, shape.ffn_width
    queries = shape.heads * shape.width_per_head
    keys = shape.key_value_heads * shape.width_per_head
    if shape.type in ("gpt2", "gpt_neox"):
        attention = [(width, 3 * width), (width, width)]
    elif shape.type == "gptj":
        attention = [(width, width)] * 4
    elif shape.type in ("llama", "qwen2", "qwen3"):
        attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
        return [*attention, (width, inner), (width, inner), (inner, width)]
    else:
        raise ValueError(f"architecture type {shape.type!r}: expected one of {', '.join(TYPES)}")
    return [*attention, (width, inner), (inner, width)]


def count_parameters(architecture: Architecture) -> ParameterCount:
    """Return the exact number of parameters of a model of this shape, by where they are."""
    shape = architecture
    matrices = linear_shapes(shape)
    weights = sum(inputs * outputs for inputs, outputs in matrices)
    biases = sum(outputs for _, outputs in matrices)
    feed_forward_biases = shape.ffn_width + shape.width
    layer_norm, rms_norm = 2 * shape.width, shape.width
    attention_biases = sum(outputs for _, outputs in matrices[:3])
    extra = {
        "gpt2": 2 * layer_norm + biases,
        "gptj": layer_norm + feed_forward_biases,
        "gpt_neox": 2 * layer_norm + biases,
        "llama": 2 * rms_norm,
        "qwen2": 2 * rms_norm + attention_biases,
        "qwen3": 2 * rms_norm + 2 * shape.width_per_head,
    }
    embedding = shape.vocabulary * shape.width
    head = 0 if shape.tied else embedding
    if shape.type == "gpt2":
        embedding += shape.context * shape.width
    if shape.type == "gptj":
        head += shape.vocabulary  # the head's bias is its own even when the weight is tied
    norm = layer_norm if shape.type.startswith("gpt") else rms_norm
    return ParameterCount(embedding, weights + extra[shape.type], shape.layers, norm, head)


def count_lora(architecture: Architecture, rank: int, train_blocks: int | None = None) -> int:
    """Return the parameters of an adapter on every linear layer of the last blocks."""
    blocks = architecture.layers if train_blocks is None else train_blocks
    return blocks * rank * sum(inputs + outputs for inputs, outputs in linear_shapes(architecture))
