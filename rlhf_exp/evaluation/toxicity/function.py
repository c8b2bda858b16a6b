"""Toxicity by a user's own function of texts."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.errors import UserError

UserToxicity = Callable[[list[str]], Sequence[float]]


class FunctionToxicity:
    """Scores by a function that takes a list of texts and returns as many numbers from 0 to 1.

    Attributes:
        name: the function, with its file's name.

    Args:
        function: the function.
        name: `file.py:function`.
        key: the config key that named it, for errors.
    """

    def __init__(self, function: UserToxicity, name: str, key: str) -> None:
        self.function, self.name = function, Path(name).name
        self._option = f"{key}={name}"

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the toxicity of each of N texts: [N], 0 to 1.

        Raises:
            UserError: the function failed, or returned something else.
        """
        scores = self._call(list(texts))
        if len(scores) != len(texts):
            raise UserError(
                f"{self._option} returned {len(scores)} scores for {len(texts)} texts; return one "
                "number for each"
            )
        for text, score in zip(texts, scores, strict=True):
            if not 0 <= score <= 1:  # false for NaN too
                raise UserError(
                    f"{self._option} returned {score} for the text {text[:80]!r}; return a number "
                    "from 0 to 1"
                )
        return np.array(scores, dtype=np.float64)

    def _call(self, texts: list[str]) -> list[float]:
        try:
            answer = self.function(texts)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self._option} failed on {len(texts)} texts at {place.filename}:{place.lineno}: "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            return [float(score) for score in answer]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._option} returned {type(answer).__name__} with {error}; return a list of "
                "numbers, one for each text"
            ) from error
