"""Scores of what was sampled, from the sampler's own states where these serve.

B rows, S tokens of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.batch import Samples
from rlhf_exp.data.codec import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.scoring import ModelScorer, Scorer
from rlhf_exp.models.branch import Branch
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.models.shared import read_scores


class SharedTrunkScorer(ModelScorer):
    """Scores by a reward model over the policy's frozen trunk.

    Token ids are scored as by any reward model with the policy's tokenizer.

    Args:
        model: The reward model.
        branch: Its blocks above that trunk.
        codec: The policy's codec, and the reward model's.
        world: Device and precision.
        batch: Rows of one forward.
        seq_length: Most tokens that the reward model reads of token ids.
    """

    def __init__(
        self,
        model: RewardModel,
        branch: Branch,
        codec: Codec,
        world: World,
        batch: int,
        seq_length: int,
    ) -> None:
        super().__init__(model, codec, None, world, batch, seq_length)
        self.branch = branch

    @torch.no_grad()
    def of_states(self, states: Tensor, closing: Tensor, ends: Tensor) -> Tensor:
        """Return scores [B] float32 on the CPU.

        Args:
            states: [B, S, D] that leave the trunk, of prompts and responses.
            closing: [B, D] the same of an end-of-sequence token after the content.
            ends: [B] int64, the position of that token.
        """
        scores = torch.empty(len(states), dtype=torch.float32)
        for part in torch.argsort(ends.cpu(), stable=True).split(self.batch):
            last = ends[part]
            # A response may have no token after its content.
            width = int(last.max()) + 1
            rows = states.new_zeros(len(part), width, states.shape[2])
            known = min(width, states.shape[1])
            rows[:, :known] = states[part, :known]
            rows[torch.arange(len(part)), last] = closing[part]
            with self.autocast():
                values = read_scores(self.model, self.branch, rows, last)
            scores[part] = values.float().cpu()
        return scores


def score_samples(scorer: Scorer, samples: Samples) -> Tensor:
    """Return the scores [B] float32 of what was sampled."""
    states, closing = samples.states, samples.closing
    if isinstance(scorer, SharedTrunkScorer) and states is not None and closing is not None:
        ends = samples.prompt_lengths + samples.content_lengths
        if int(ends.max()) < scorer.seq_length:  # else rows lose their start first
            return scorer.of_states(states, closing, ends)
    return scorer(samples.tokens.cpu(), samples.prompt_lengths.cpu(), samples.content_lengths.cpu())
