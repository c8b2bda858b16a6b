"""Special tokens in what people wrote: `<|im_end|>` in a user's text is ten characters, no end.

A tokenizer makes the token itself of such a text, wherever the prompt format's own special tokens
are to be read as such: the model would see a turn end where a user has only written so. Here the
text is cut inside each name of such a token, and the parts are encoded apart: the ids decode to
what was written, and none of them is a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf_exp.data.rows import History, Turn
from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = "\U000f5c1f"
"""Marks a cut: a character for private use, which no text holds."""


class LiteralText:
    """Encodes texts in which some names of special tokens are meant as they are written.

    Args:
        tokenizer: the tokenizer.
        structural: tokens that a prompt format writes and that the tokenizer does not call special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, structural: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {*special, *tokenizer.all_special_tokens, *structural}
        self._names = sorted(filter(str.strip, names), key=lambda name: (-len(name), name))
        self._any = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        known = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
        # A text may well have unknown parts.
        self._ids = {known[name] for name in self._names if name in known}
        self._ids.discard(tokenizer.unk_token_id)

    def mark(self, text: str) -> str:
        """Return a text with a mark inside each name of a special token, for `encode_marked`."""
        if not self._any.search(text):
            return text
        return self._any.sub(
            lambda name: f"{name[0][0]}{_CUT}{name[0][1:]}", text.replace(_CUT, "")
        )

    def mark_turns(self, history: History) -> History:
        """Return a history with marks in the texts of its turns."""
        return tuple(Turn(turn.role, self.mark(turn.text)) for turn in history)

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text with marks; names of special tokens without one are the tokens.

        Raises:
            UserError: the tokenizer makes a special token of a part of a name.
        """
        parts = text.split(_CUT)
        ids: list[int] = []
        for part in parts:
            encoded = self._tokenizer(part, add_special_tokens=False, verbose=False)
            ids += encoded["input_ids"]
        written = sum(len(self._any.findall(part)) for part in parts)
        if len(parts) > 1 and sum(token in self._ids for token in ids) > written:
            raise UserError(
                f"{self._tokenizer.name_or_path or 'the tokenizer'} makes special tokens of a text "
                f"that only names them: {text.replace(_CUT, '')[:80]!r}; take the names out of the "
                "data"
            )
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which no special token is meant."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        rows = [list(ids) for ids in encoded["input_ids"]]
        # Some tokenizers know no such option, or not for tokens that they do not call special.
        for number, text in enumerate(texts):
            if self._any.search(text) and not self._ids.isdisjoint(rows[number]):
                rows[number] = self.encode_marked(self.mark(text))
        return rows
