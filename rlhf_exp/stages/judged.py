"""Scores of held-out pairs, which no model under evaluation wrote."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.data.codec import Codec
from rlhf_exp.data.collate import joined
from rlhf_exp.data.ragged import Ragged
from rlhf_exp.data.rows import Preference
from rlhf_exp.data.tokenized import tokenize_preferences
from rlhf_exp.engines.native.scoring import score_shared
from rlhf_exp.evaluation.answers import Answer
from rlhf_exp.stages.labels import BLANK, CHOSEN, REJECTED, pairs_part
from rlhf_exp.stages.scorers import Judges


def score_pairs(
    rows: list[Preference], part: str, codec: Codec, judges: Judges
) -> dict[str, list[Answer]]:
    """Return both sides of the pairs and an empty answer, as answers with scores.

    Args:
        rows: The pairs.
        part: The part of the evaluation that asks.
        codec: Writes them as tokens, cut as the reward model's training pairs are.
        judges: Score them; all processes take part.
    """
    if not rows:
        return {CHOSEN: [], REJECTED: [], BLANK: []}
    config, world = judges.config, judges.world
    cache = judges.context.cache / "tokenized"
    tokenized = tokenize_preferences(rows, codec, config.reward.seq_length, cache)
    reward, referee = judges.reward(codec), judges.referee(codec)
    prompts = tokenized.prompt
    # An empty answer is its end-of-sequence token.
    empty = Ragged.of([[codec.eos_id]] * len(rows))
    found: dict[str, list[Answer]] = {}
    for side, texts, ids in (
        (CHOSEN, [row.chosen for row in rows], tokenized.chosen),
        (REJECTED, [row.rejected for row in rows], tokenized.rejected),
        (BLANK, [""] * len(rows), empty),
    ):
        whole = _whole(prompts, ids)
        scores = score_shared(reward, *whole, world).tolist()
        others = None if referee is None else score_shared(referee, *whole, world).tolist()
        found[side] = [
            Answer(
                part=pairs_part(part),
                model=side,
                row=row,
                sample=0,
                seed=config.eval.seed,
                prompt=codec.decode(prompts[row].tolist()),
                text=texts[row],
                tokens=len(ids[row]),
                finish="eos",
                score=scores[row],
                referee=None if others is None else others[row],
            )
            for row in range(len(rows))
        ]
    return found


def _whole(prompts: Ragged, answers: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, prompt lengths and content lengths [N] as a scorer takes them."""
    tokens, _ = joined([(prompts[row], answers[row]) for row in range(len(prompts))])
    lengths = np.stack([prompts.lengths(), answers.lengths()], axis=1).astype(np.int64)
    return tokens, torch.from_numpy(lengths[:, 0]), torch.from_numpy(lengths[:, 1] - 1)
