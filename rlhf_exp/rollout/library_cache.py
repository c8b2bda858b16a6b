"""The cache that a model makes itself: rows of one length, decoded in lockstep.

It serves families whose blocks keep a state, bias attention by distance, or attend in ways of their
own. No row may be padded, so all are at one position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.errors import UserError

NAMES = ("past_key_values", "cache_params", "state")
"""Names that families have for their cache, as an argument and as an output."""


class LibraryCache:
    """The cache of a model's last outputs.

    Args:
        model: the model without its head.
    """

    lockstep = True
    """Whether all rows have to be at one position."""

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._names = [name for name in NAMES if name in parameters]
        self._family: str = model.config.model_type
        self._takes_positions = "position_ids" in parameters
        self._cache: dict[str, Any] = {}

    @contextmanager
    def prefilling(self, positions: Tensor, slots: slice) -> Iterator[dict[str, Any]]:
        """Begin with prompts of one length; yield the model's arguments besides the tokens."""
        self._cache = {}
        yield self._arguments(positions)

    @contextmanager
    def stepping(self, positions: Tensor, longest: int) -> Iterator[dict[str, Any]]:
        """Append a token to each row; yield the model's arguments besides the tokens."""
        yield self._arguments(positions.unsqueeze(1)) | self._cache

    def keep(self, output: Any) -> None:  # noqa: ANN401 - one of the library's outputs
        """Take the cache from the model's output.

        Raises:
            UserError: there is none.
        """
        self._cache = {name: output[name] for name in self._names if output.get(name) is not None}
        if not self._cache:
            raise UserError(
                f"a {self._family!r} model cannot be sampled from: it returns no cache "
                f"(none of {', '.join(NAMES)})"
            )

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Do nothing: rows stay where they are until all of them have ended."""

    def _arguments(self, positions: Tensor) -> dict[str, Any]:
        # Without an argument for positions, the model counts the tokens in its cache.
        return {"position_ids": positions} if self._takes_positions else {}
