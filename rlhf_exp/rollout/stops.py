"""Stop strings, found while decoding.

A response ends with the token that completes a stop string. Whether a token can do that is looked
up in a table of the tokens seen so far (its text must hold the last character of a stop string);
only then is the response decoded, as a whole, because a tokenizer's text of many tokens need not be
the sum of their texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

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
