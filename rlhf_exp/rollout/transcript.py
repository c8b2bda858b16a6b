"""What each row has said so far, on the host, and when it has ended.

Stop strings, found while decoding.

A response ends with the token that completes a stop string. Whether a token can do that is looked
up in a table of the tokens seen so far (its text must hold the last character of a stop string);
only then is the response decoded, as a whole, because a tokenizer's text of many tokens need not be
the sum of their texts.

The states that enter one decoder block, kept while rows are decoded.

B rows, W columns that a row's tokens come to at most, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Finish


class Transcript:
    """The responses of B rows as they grow.

    Args:
        rows: B.
        max_new_tokens: a response's length at most.
        eos_id: the token that ends a response and belongs to it, but not to its content.
        stopper: finds stop strings, or None.

    Attributes:
        responses: token ids of each row.
        content_lengths: of each row that has ended: tokens without what ended it.
        finish: why each row that has ended did.
    """

    def __init__(
        self, rows: int, max_new_tokens: int, eos_id: int, stopper: Stopper | None
    ) -> None:
        self.responses: list[list[int]] = [[] for _ in range(rows)]
        self.content_lengths = [0] * rows
        self.finish = [Finish.LENGTH] * rows
        self._max_new_tokens = max_new_tokens
        self._eos_id = eos_id
        self._stopper = stopper

    def add(self, row: int, token: int) -> bool:
        """Append `token` to `row` and return whether this ends the row."""
        response = self.responses[row]
        response.append(token)
        if token == self._eos_id:
            return self._end(row, len(response) - 1, Finish.EOS)
        if self._stopper is not None and self._stopper.may_complete(token):
            content = self._stopper.content_length(response)
            if content is not None:
                return self._end(row, content, Finish.STOP)
        if len(response) == self._max_new_tokens:
            return self._end(row, len(response), Finish.LENGTH)
        return False

    def _end(self, row: int, content_length: int, finish: Finish) -> bool:
        self.content_lengths[row] = content_length
        self.finish[row] = finish
        return True


UNDECODABLE = "\ufffd"


class Stopper:
    """Finds the stop strings of one tokenizer.

    Args:
        tokenizer: whose ids the responses consist of.
        stop_strings: texts that end a response; none may be empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), f"an empty stop string in {stop_strings!r}"
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._last = {stop[-1] for stop in self._stop_strings}
        # A character beyond ASCII may be spread over several tokens, none of which shows it.
        if not all(each.isascii() for each in self._last):
            self._last.add(UNDECODABLE)
        # Some tokenizers drop the space at the beginning of a text: a token alone may hide it.
        self._any_token = any(each.isspace() for each in self._last)
        self._may_complete: dict[int, bool] = {}

    def may_complete(self, token: int) -> bool:
        """Return whether a stop string can end within this token."""
        known = self._may_complete.get(token)
        if known is None:
            text = self._decode([token])
            known = self._any_token or any(each in text for each in self._last)
            self._may_complete[token] = known
        return known

    def content_length(self, response: Sequence[int]) -> int | None:
        """Return how many tokens stand wholly before the stop string that the response ends with.

        White space before the stop string separates turns: tokens of nothing else do not count,
        for data sets' responses end without it, and reward models have seen no other end.

        Args:
            response: token ids, none of whose shorter beginnings holds a stop string.

        Returns:
            The number of tokens, at least 0, or None where there is no stop string.
        """
        if not response or not self.may_complete(response[-1]):
            return None
        text = self._decode(response)
        found = [text.find(stop) for stop in self._stop_strings]
        start = min((place for place in found if place >= 0), default=None)
        if start is None:
            return None
        length = len(response) - 1
        while length and len(self._decode(response[:length])) > start:
            length -= 1
        said = self._decode(response[:length]).rstrip()
        while length and self._decode(response[: length - 1]).rstrip() == said:
            length -= 1
        return length

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class KeptStates:
    """States by row and column of the token that was fed.

    Column W holds the state of the token that closes a row's content, beside what the row said;
    column W + 1 is for what nobody reads.

    Args:
        rows: B.
        width: W.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.closing = width
        self._rows = rows
        self._states: Tensor | None = None

    def put(self, rows: Tensor, columns: Tensor | slice, states: Tensor) -> None:
        """Store `states` [N, D] of `rows` [N] at `columns` [N], or [N, P, D] at a slice of P."""
        if self._states is None:
            shape = (self._rows, self.closing + 2, states.shape[-1])
            # A tensor made in inference mode could not be trained on.
            with torch.inference_mode(False):
                self._states = torch.zeros(shape, dtype=states.dtype, device=states.device)
        self._states[rows, columns] = states

    def of_tokens(self, lengths: Tensor, width: int) -> Tensor | None:
        """Return the states [B, width, D] of the first `lengths` [B] tokens of each row, then 0."""
        if self._states is None:
            return None
        states = self._states[:, :width]
        return states.masked_fill_(~response_mask(lengths, width).unsqueeze(2), 0.0)

    def of_closing(self) -> Tensor | None:
        """Return the states [B, D] of the closing tokens."""
        return None if self._states is None else self._states[:, self.closing].clone()
