"""How to sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: T, at least 1.
        temperature: above 0; logits are divided by it.
        batch: most rows decoded at the same time.
        eos_id: ends a response; -1 for none.
        pad_id: fills `Samples.tokens` on the right.
        greedy: take the most probable token instead of sampling.
        top_p: above 0, at most 1: sample from the nucleus of this probability only. Here and with
            `top_k`, `Samples.logprobs` are those of the distribution that was cut and scaled up.
        top_k: sample from so many most probable tokens only; 0 for all.
    """

    max_new_tokens: int
    temperature: float
    batch: int
    eos_id: int
    pad_id: int
    greedy: bool = False
    top_p: float = 1.0
    top_k: int = 0

    @property
    def whole(self) -> bool:
        """Whether every token can be drawn: what training needs of its samples."""
        return self.top_p == 1.0 and self.top_k == 0
