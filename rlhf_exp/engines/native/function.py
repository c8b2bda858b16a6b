"""Scores from a function of the user's own."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_exp.data.codec import Codec
from rlhf_exp.engines.native.scoring import texts_of
from rlhf_exp.errors import UserError

UserReward = Callable[[list[str], list[str]], Sequence[float]]


class FunctionScorer:
    """Scores by a user's function of texts.

    Args:
        function: Takes lists of prompts and responses, returns as many finite numbers.
        codec: Turns token ids into the texts that the function reads.
        name: For error messages.
    """

    def __init__(self, function: UserReward, codec: Codec, name: str) -> None:
        self.function, self.codec, self.name = function, codec, name

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`.

        Raises:
            UserError: The function returned another number of scores, or one that is not finite.
        """
        prompts, responses = texts_of(tokens, prompt_lengths, content_lengths, self.codec)
        scores = self._call(prompts, responses)
        if len(scores) != len(prompts):
            raise UserError(
                f"ppo.reward.function={self.name} returned {len(scores)} scores for "
                f"{len(prompts)} responses; return one number for each"
            )
        for response, score in zip(responses, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(
                    f"ppo.reward.function={self.name} returned {score} for the response "
                    f"{response[:80]!r}; return a finite number"
                )
        return torch.tensor(scores, dtype=torch.float32)

    def _call(self, prompts: list[str], responses: list[str]) -> list[float]:
        try:
            answer = self.function(prompts, responses)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"ppo.reward.function={self.name} failed on {len(prompts)} responses at "
                f"{place.filename}:{place.lineno}: {type(error).__name__}: {error}"
            ) from error
        try:
            return [float(score) for score in answer]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"ppo.reward.function={self.name} returned {type(answer).__name__} with {error}; "
                "return a list of numbers, one for each response"
            ) from error


def load_function(reference: str, key: str = "ppo.reward.function") -> UserReward:
    """Load a user's function, given as `file.py:name`.

    Args:
        reference: The file and the function's name.
        key: The config key that named it, for errors.

    Raises:
        UserError: The file cannot be run, or has no function of that name.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{key}={reference}: no Python file at {path.absolute()}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{key}={reference}: running {path} failed: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}={reference}: {path} has no function {name!r}")
    return function
