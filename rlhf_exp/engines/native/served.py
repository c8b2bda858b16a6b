"""Scores from a reward server."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.data.codec import Codec
from rlhf_exp.engines.native.reward_server import RewardServer
from rlhf_exp.engines.native.scoring import texts_of


class ServerScorer:
    """Scores by a server; each process sends its own rows.

    Args:
        server: What is asked.
        codec: Of the policy.
    """

    def __init__(self, server: RewardServer, codec: Codec) -> None:
        self.server, self.codec = server, codec

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`.

        Raises:
            UserError: See `RewardServer.scores`.
        """
        prompts, responses = texts_of(tokens, prompt_lengths, content_lengths, self.codec)
        ids = None
        told = self.server.told
        if told is not None and told.tokenizer == self.codec.digest:
            lengths = (prompt_lengths + content_lengths).tolist()
            ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        return torch.tensor(self.server.scores(prompts, responses, ids), dtype=torch.float32)
