"""A reward model that scores texts, or the token ids that they were sampled as."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from rlhf_exp.data.codec import Codec
from rlhf_exp.engines.native.scoring import ModelScorer


class Scores:
    """Scores one request at a time.

    Attributes:
        name: Of the reward: it changes with all that decides the scores.

    Args:
        scorer: Of the reward model, for its own codec.
        codec: The same codec.
        name: See above.
    """

    def __init__(self, scorer: ModelScorer, codec: Codec, name: str) -> None:
        self.scorer, self.codec, self.name = scorer, codec, name
        self._lock = threading.Lock()

    def of_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the scores of responses, each ended by the end-of-sequence token."""
        heads = self.codec.encode_decoded(prompts)
        tails = self.codec.encode_responses(responses)
        return self.of_tokens([head + tail for head, tail in zip(heads, tails, strict=True)])

    def of_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of prompts and responses as ids, without what ended the responses.

        Raises:
            ValueError: An id is none of this tokenizer's.
        """
        if not rows:
            return []
        size = self.codec.vocab_size
        if any(not 0 <= number < size for row in rows for number in row):
            raise ValueError(f"a token is not in 0 to {size - 1}")
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), max(1, int(lengths.max()))), self.codec.pad_id)
        for line, row in enumerate(rows):
            tokens[line, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        with self._lock:
            return self.scorer(tokens, lengths, torch.zeros_like(lengths)).tolist()
