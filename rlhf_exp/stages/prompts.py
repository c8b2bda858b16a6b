"""The prompts that PPO answers, as token ids."""

from __future__ import annotations

from rlhf_exp.config.root import Config
from rlhf_exp.data.codec import Codec
from rlhf_exp.data.rows import Prompt
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.errors import UserError
from rlhf_exp.stages.context import StageContext


def ppo_prompts(
    config: Config, context: StageContext, codec: Codec
) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    """Return the training prompts, and those of validation (the same where there are none).

    Raises:
        UserError: There are no prompts, or one lacks the response that scores are compared with.
    """
    rows = context.materials.corpus.prompts
    train = _tokenized(rows.train, codec, config, context)
    return train, _tokenized(rows.validation or rows.train, codec, config, context)


def _tokenized(
    rows: list[Prompt], codec: Codec, config: Config, context: StageContext
) -> TokenizedPrompts:
    section = config.ppo
    if not rows:
        raise UserError("data: no prompts; give data.prompts or data.preferences")
    bare = [row.origin for row in rows if row.original is None] if section.reward.delta else []
    if bare:
        raise UserError(
            "ppo.reward.delta=true subtracts the score of the data set's own response, but "
            f"{bare[0]} has none; give prompts with responses or set ppo.reward.delta=false"
        )
    return tokenize_prompts(
        rows,
        codec,
        section.seq_length,
        section.generation.max_new_tokens,
        context.cache / "tokenized",
    )
