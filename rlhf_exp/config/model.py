"""`model`: which language model, and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting


class Family(Enum):
    """Decoder families that can be built from scratch and planned without loading."""

    gpt2 = "gpt2"
    gptj = "gptj"
    gpt_neox = "gpt_neox"
    llama = "llama"
    qwen2 = "qwen2"


class Dtype(Enum):
    """Number formats of weights and of mixed precision."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(Enum):
    """Attention implementations of transformers."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


@dataclass
class ArchitectureConfig:
    """The model's shape: builds `tiny`, and lets `plan` estimate any model with no network."""

    type: Family = setting(Family.gpt_neox, "Decoder family.")
    layers: int = setting(4, "Number of blocks.")
    width: int = setting(128, "Hidden width.")
    heads: int = setting(4, "Attention heads.")
    kv_heads: int | None = setting(None, "Key-value heads; null: as many as `heads`.")
    ffn_width: int | None = setting(None, "Feed-forward width; null: four times `width`.")
    vocabulary: int = setting(1024, "Vocabulary size; for a model from scratch, its tokenizer's.")
    context: int = setting(256, "Longest sequence in tokens.")
    tied: bool = setting(False, "Whether input and output embeddings are one matrix.")


@dataclass
class ModelConfig:
    """The model that SFT starts from."""

    name: str = setting("tiny", "Label in tables and reports.", key=False)
    path: str | None = setting(None, "Hub id or folder; null: built from scratch.")
    revision: str | None = setting(None, "Revision of a hub id.")
    dtype: Dtype = setting(Dtype.float32, "Number format of the weights in memory.")
    attention: Attention = setting(Attention.sdpa, "Attention implementation.", key=False)
    architecture: ArchitectureConfig = setting(
        factory=ArchitectureConfig, doc="Shape; checked against the real config on load."
    )
    seed: int = setting(0, "Seed of a model from scratch.")
