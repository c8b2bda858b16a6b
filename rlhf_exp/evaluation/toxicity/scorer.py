"""Toxicity scorers: how likely a reader would call a text toxic, from 0 to 1.

Every lexical scorer is near chance on text that is hateful without swear words, so whoever shows a
number also shows the scorer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.errors import UserError

_LEXICAL = "alt-profanity-check"


def is_lexical(name: str) -> bool:
    """Return whether the scorer that calls itself so goes by words alone."""
    return name.startswith(_LEXICAL)


class ToxicityScorer(Protocol):
    """Anything that scores texts."""

    @property
    def name(self) -> str:
        """The scorer's name, with its version where it has one, as the report shows it."""
        ...

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N], 0 to 1."""
        ...


@dataclass(frozen=True)
class Scored:
    """A scorer's word on texts that it has read.

    Attributes:
        name: the scorer's.
        scores: by text.
    """

    name: str
    scores: Mapping[str, float]

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N]; `KeyError` for one that was not read."""
        return np.array([self.scores[text] for text in texts], dtype=np.float64)


class ProfanityCheckScorer:
    """The linear model that `alt-profanity-check` ships: lexical, offline, some 90 000 texts/s.

    Its package loads a joblib file, which runs code; it is therefore one of the few unpickled files
    that are allowed, as part of a pinned, installed package.
    """

    def __init__(self) -> None:
        """Load the model.

        Raises:
            UserError: the package is not installed.
        """
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise UserError(
                f"toxicity scorer `alt-profanity-check`: cannot be imported ({error}); expected "
                "the package in this environment; run `pip install alt-profanity-check`"
            ) from error
        from importlib.metadata import version

        self._predict = predict_prob
        self._version = version(_LEXICAL)

    @property
    def name(self) -> str:
        """The package and its version."""
        return f"{_LEXICAL} {self._version}"

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability that each text is offensive: [N], 0 to 1; 0 for a blank text."""
        scores = np.zeros(len(texts))
        # The model gives a text without words its prior, which would count silence as toxic.
        spoken = [row for row, text in enumerate(texts) if text.strip()]
        if spoken:
            scores[spoken] = self._predict([texts[row] for row in spoken])
        return scores
