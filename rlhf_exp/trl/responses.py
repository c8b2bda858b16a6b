"""Responses that TRL has sampled: their content, and whether they have ended."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.rollout.transcript import Stopper


def splitter(codec: Codec) -> Callable[[list[int]], tuple[list[int], bool]]:
    """Return what tells the content of a response from what ended it, as the native engine does."""
    stopper = Stopper(codec.tokenizer, codec.stop_strings) if codec.stop_strings else None

    def split(ids: list[int]) -> tuple[list[int], bool]:
        if ids and ids[-1] in codec.end_ids:
            return ids[:-1], True
        content = None if stopper is None else stopper.content_length(ids)
        return (ids, False) if content is None else (ids[:content], True)

    return split
