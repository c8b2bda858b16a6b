"""The shape of a model, from the config's `model.architecture`; for plans too, so without torch."""

from __future__ import annotations

from rlhf_exp.config.experiment import ArchitectureConfig
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
