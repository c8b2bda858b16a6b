"""Judges that give each answer a score, whichever model scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rlhf_exp.evaluation.judges.judge import Pair, Verdict
from rlhf_exp.evaluation.statistics import TIE_BAND, outcome_signs, paired

Score = Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]
"""(N prompts, N answers) -> [N] scores, of which the difference of two is a log-odds."""


class RewardJudge:
    """Prefers the answer with the higher score, unless the two are too close.

    Attributes:
        name: what reports call it.

    Args:
        score: a reward model, as a function of texts.
        tie_band: Bradley-Terry probabilities that count as a tie.
    """

    def __init__(self, name: str, score: Score, tie_band: tuple[float, float] = TIE_BAND) -> None:
        self.name = name
        self.score, self.tie_band = score, tie_band

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """See `Judge`."""
        prompts = [pair.prompt for pair in pairs] * 2
        answers = [pair.answer_a for pair in pairs] + [pair.answer_b for pair in pairs]
        scores = self.score(prompts, answers)
        return score_verdicts(scores[: len(pairs)], scores[len(pairs) :], self.tie_band)


def score_verdicts(
    scores_a: ArrayLike, scores_b: ArrayLike, tie_band: tuple[float, float] = TIE_BAND
) -> list[Verdict]:
    """Return the verdicts that scores [N] of both answers amount to; see `outcome_signs`.

    Raises:
        ValueError: unequal lengths, or a score that is not finite.
    """
    a, b = paired(scores_a, scores_b)
    signs, chances = outcome_signs(a, b, tie_band), special.expit(b - a)
    return [Verdict(int(s), probability=float(p)) for s, p in zip(signs, chances, strict=True)]
