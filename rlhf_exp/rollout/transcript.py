"""Responses while they are decoded: their tokens, their ends (stop strings), captured states.

B rows, W most tokens of a row (prompt and response), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import FinishReason

UNDECODABLE = "\ufffd"
"""Stands in a tokenizer's text for bytes that are no whole character."""


OnRow = Callable[[int, list[int], int], object]
"""Told a response that has ended: its row, its tokens, and how many of them are content."""


class Transcript:
    """The responses of B rows while they are decoded, on the host.

    Args:
        rows: B.
        max_new_tokens: longest response.
        end_ids: the tokens that end a response and belong to it, but not to its content.
        stopper: finds stop strings, or None.
        on_row: told each response as it ends, or None.

    Attributes:
        responses: token ids of each row.
        content_lengths: of each row that has ended: its tokens without the end-of-sequence token
            or the stop string.
        finish: why each row has ended.
    """

    def __init__(
        self,
        rows: int,
        max_new_tokens: int,
        end_ids: Collection[int],
        stopper: Stopper | None,
        on_row: OnRow | None = None,
    ) -> None:
        self.responses: list[list[int]] = [[] for _ in range(rows)]
        self.content_lengths = [0] * rows
        self.finish = [FinishReason.LENGTH] * rows
        self._max_new_tokens = max_new_tokens
        self._end_ids = end_ids
        self._stopper = stopper
        self._on_row = on_row

    def add(self, row: int, token: int) -> bool:
        """Append `token` to `row` and return whether this ends the row."""
        response = self.responses[row]
        response.append(token)
        if token in self._end_ids:
            return self._end(row, len(response) - 1, FinishReason.EOS)
        if self._stopper is not None and self._stopper.may_complete(token):
            content = self._stopper.content_length(response)
            if content is not None:
                return self._end(row, content, FinishReason.STOP)
        if len(response) == self._max_new_tokens:
            return self._end(row, len(response), FinishReason.LENGTH)
        return False

    def _end(self, row: int, content_length: int, finish: FinishReason) -> bool:
        self.content_lengths[row] = content_length
        self.finish[row] = finish
        if self._on_row is not None:
            self._on_row(row, list(self.responses[row]), content_length)
        return True


class Stopper:
    """Finds stop strings in responses.

    A response ends with the token that completes a stop string. A table of the tokens seen so far
    says whether a token can do that: its text must contain the last character of a stop string.
    Only then is the response decoded, and all of it, because a tokenizer's text of many tokens need
    not be the sum of their texts.

    Args:
        tokenizer: decodes the responses' token ids.
        stop_strings: texts that end a response; none may be empty.

    Attributes:
        stop_strings: the texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), f"an empty stop string in {stop_strings!r}"
        self._tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self._last_characters = {stop[-1] for stop in self.stop_strings}
        # A character beyond ASCII may be spread over several tokens, none of which shows it.
        if not all(character.isascii() for character in self._last_characters):
            self._last_characters.add(UNDECODABLE)
        # Some tokenizers drop the space at the beginning of a text: a token alone may hide it.
        self._any_token = any(character.isspace() for character in self._last_characters)
        self._may_complete: dict[int, bool] = {}

    def may_complete(self, token: int) -> bool:
        """Return whether a stop string can end within this token."""
        if token not in self._may_complete:
            text = self._decode([token])
            self._may_complete[token] = self._any_token or any(
                character in text for character in self._last_characters
            )
        return self._may_complete[token]

    def content_length(self, response: Sequence[int]) -> int | None:
        """Return the number of tokens before the stop string that the response ends with.

        Tokens of white space alone before the stop string separate turns and do not count: data
        sets' responses end without them, and reward models have seen no other end.

        Args:
            response: token ids; no shorter prefix of them contains a stop string.

        Returns:
            The number of tokens, at least 0, or None if there is no stop string.
        """
        if not response or not self.may_complete(response[-1]):
            return None
        text = self._decode(response)
        starts = [text.find(stop) for stop in self.stop_strings]
        start = min((start for start in starts if start >= 0), default=None)
        if start is None:
            return None
        length = len(response) - 1
        while length and len(self._decode(response[:length])) > start:
            length -= 1
        content = self._decode(response[:length]).rstrip()
        while length and self._decode(response[: length - 1]).rstrip() == content:
            length -= 1
        return length

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class CapturedStates:
    """The states that enter one decoder block, by row and column of the token that was fed.

    Column W holds the state of the token that closes a row's content; column W + 1 and row B take
    states that nobody reads.

    Args:
        rows: B.
        width: W.

    Attributes:
        closing: W, the column of the closing token.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.closing = width
        self._rows = rows
        self._states: Tensor | None = None

    def store(self, rows: Tensor, columns: Tensor | slice, states: Tensor) -> None:
        """Store `states` [N, D] of `rows` [N] at `columns` [N], or [N, P, D] at a slice of P."""
        if self._states is None:
            shape = (self._rows + 1, self.closing + 2, states.shape[-1])
            # A tensor created in inference mode could not be trained on.
            with torch.inference_mode(False):
                self._states = torch.zeros(shape, dtype=states.dtype, device=states.device)
        self._states[rows, columns] = states

    def token_states(self, lengths: Tensor, width: int) -> Tensor | None:
        """Return the states [B, width, D] of the first `lengths` [B] tokens of each row, then 0."""
        if self._states is None:
            return None
        states = self._states[: self._rows, :width]
        return states.masked_fill_(~response_mask(lengths, width).unsqueeze(2), 0.0)

    def closing_states(self) -> Tensor | None:
        """Return the states [B, D] of the closing tokens."""
        return None if self._states is None else self._states[: self._rows, self.closing].clone()
