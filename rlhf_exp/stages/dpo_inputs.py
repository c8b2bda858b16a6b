"""The inputs of DPO, whichever the engine: pairs, and the validation prompts that are answered."""

from __future__ import annotations

from rlhf_exp.config.experiment import Config
from rlhf_exp.data.tokenized import (
    TokenizedPreferences,
    TokenizedPrompts,
    tokenize_preferences,
    tokenize_prompts,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.stages.context import StageContext


def dpo_pairs(
    config: Config, context: StageContext, codec: Codec
) -> tuple[TokenizedPreferences, TokenizedPreferences]:
    """Return the training pairs, and those of validation."""
    section, rows = config.dpo, context.materials.corpus.preferences
    chosen = context.materials.training_pairs("dpo", section.part)
    # A small data set may leave nothing to validate on: the training pairs then stand in.
    held_out = rows.validation or rows.train[:100]
    pairs, validation = (
        tokenize_preferences(part, codec, section.seq_length, context.cache / "tokenized")
        for part in (chosen, held_out)
    )
    return pairs, validation


def dpo_prompts(config: Config, context: StageContext, codec: Codec) -> TokenizedPrompts | None:
    """Return the validation prompts that evaluations answer; `None` with `eval_prompts=0`."""
    section, rows = config.dpo, context.materials.corpus.prompts
    asked = (rows.validation or rows.train)[: section.eval_prompts]
    if not asked:
        return None
    return tokenize_prompts(
        asked,
        codec,
        section.seq_length,
        section.generation.max_new_tokens,
        context.cache / "tokenized",
    )
