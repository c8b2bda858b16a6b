"""A reward model that the reward stage wrote, as a scorer of texts.

B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_exp.data.codec import Codec
from rlhf_exp.data.hh import parse_prompt
from rlhf_exp.data.rows import History
from rlhf_exp.errors import UserError
from rlhf_exp.models.reward_model import RewardModel


class OwnRewardModel:
    """Scores prompt and answer, ended by the end-of-sequence token, as in training.

    Attributes:
        cut: rows so far that were too long and lost their beginning.

    Args:
        model: the reward model.
        codec: its tokenizer, and how dialogues are written.
        seq_length: most tokens of a row; `None`: what the model's context holds.
        device: where to compute.
        batch: rows of one forward pass.
    """

    def __init__(
        self,
        model: RewardModel,
        codec: Codec,
        seq_length: int | None = None,
        device: torch.device | str = "cpu",
        batch: int = 16,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.codec, self.device, self.batch, self.cut = codec, device, batch, 0
        context = getattr(model.trunk.config, "max_position_embeddings", None)
        self.seq_length = min(length for length in (seq_length, context, 2**31) if length)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """Return the rewards [N] of N answers."""
        heads = self.codec.encode_prompts([history_of(prompt) for prompt in prompts])
        tails = self.codec.encode_responses(answers)
        rows = [[*head, *tail, self.codec.eos_id] for head, tail in zip(heads, tails, strict=True)]
        self.cut += sum(len(row) > self.seq_length for row in rows)
        rows = [row[-self.seq_length :] for row in rows]
        scores = np.zeros(len(rows))
        # Rows of like length together: a batch costs as much as its longest row.
        order = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, len(rows), self.batch):
            part = order[start : start + self.batch]
            scores[part] = self._forward([rows[number] for number in part])
        return scores

    def _forward(self, rows: list[list[int]]) -> NDArray[np.float64]:
        width = max(len(row) for row in rows)
        tokens = [row + [self.codec.pad_id] * (width - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        found = self.model.scores(torch.tensor(tokens, device=self.device), lengths)
        values: NDArray[np.float64] = found.double().cpu().numpy()
        return values


def history_of(prompt: str) -> History:
    """Return the dialogue in a prompt's text.

    Raises:
        UserError: nothing is asked in it.
    """
    try:
        return parse_prompt(prompt)
    except ValueError as error:
        raise UserError(f"no prompt for a judge: {error}: {prompt[:80]!r}") from error
