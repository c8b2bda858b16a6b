"""From the config's `model.architecture` to the shape that models are built and planned by."""

from __future__ import annotations

from rlhf_exp.config.model import ArchitectureConfig
from rlhf_exp.models.architecture import Architecture


def shape_of(section: ArchitectureConfig, vocabulary: int | None = None) -> Architecture:
    """Return the shape, with another `vocabulary` if given (that of the tokenizer as trained)."""
    return Architecture(
        type=section.type.value,
        layers=section.layers,
        width=section.width,
        heads=section.heads,
        ffn_width=section.ffn_width or 4 * section.width,
        vocabulary=vocabulary or section.vocabulary,
        context=section.context,
        kv_heads=section.kv_heads,
        tied=section.tied,
    )
