"""Stop strings over tokenizers whose token boundaries fall in awkward places."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_exp.rollout.transcript import Stopper

HH = ("Human:", "human:", "Assistant:", "assistant:")


def byte_level(*merges: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the 256 bytes and the given merges ("a b"), none of them learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    pieces = alphabet + [left + right for left, right in pairs]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def first_stop(stopper: Stopper, tokens: list[int]) -> tuple[int, int] | None:
    """Response and content length where a response that grows token by token is stopped."""
    for count in range(1, len(tokens) + 1):
        content = stopper.content_length(tokens[:count])
        if content is not None:
            return count, content
    return None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi\n\nHuman: what", (10, 2)),  # a token a byte: "Hi", two newlines, six of "Human:"
        ("Hi\n\nyou \nHuman:", (15, 7)),  # white space within the content counts
        ("Hi: human! Human", None),
        ("assistant:", (10, 0)),
        ("caf\u00e9 Human:", (12, 5)),  # the accented letter is two bytes
        ("\n Human:", (8, 0)),
        ("\U0001f600Human:", (10, 4)),  # an emoji is four
    ],
)
def test_a_token_a_byte(text: str, expected: tuple[int, int] | None) -> None:
    tokenizer = byte_level()
    assert first_stop(Stopper(tokenizer, HH), tokenizer.encode(text)) == expected


def test_a_token_that_begins_before_the_stop_string_is_no_content() -> None:
    # "Ċ" is the newline and "Ġ" the space of byte-level BPE.
    tokenizer = byte_level("Ċ Ċ", "ĊĊ H", "u m", "a n", ": Ġ", "an :Ġ")
    tokens = tokenizer.encode("ok\n\nHuman: x")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["o", "k", "ĊĊH", "um", "an:Ġ", "x"]
    # The row ends with "an: ", whose colon completes the string; content is "ok".
    assert first_stop(Stopper(tokenizer, HH), tokens) == (5, 2)


def test_a_token_of_text_and_white_space_is_content() -> None:
    tokenizer = byte_level(". Ċ")
    tokens = tokenizer.encode("ok.\n\nHuman:")
    assert tokenizer.convert_ids_to_tokens(tokens)[:4] == ["o", "k", ".Ċ", "Ċ"]
    assert first_stop(Stopper(tokenizer, HH), tokens) == (10, 3)


def test_the_earliest_of_several_stop_strings_counts() -> None:
    tokenizer = byte_level("a b", "ab c")
    tokens = tokenizer.encode("xyabc")  # x, y, abc
    assert first_stop(Stopper(tokenizer, ["c", "ab"]), tokens) is not None
    assert first_stop(Stopper(tokenizer, ["bc", "yab"]), tokens) == (3, 1)


def test_a_stop_string_that_ends_in_a_character_of_several_tokens() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("a\u7528\uff1ab")  # each of the two characters is three bytes
    assert first_stop(Stopper(tokenizer, ["\u7528\uff1a"]), tokens) == (7, 1)


def test_a_tokenizer_that_hides_leading_spaces() -> None:
    # Decoding "▁" alone gives nothing: the sum of the tokens' texts would be "stopnow".
    pieces = ["▁stop", "▁now", "▁", "n", "o", "w", "."]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([2]) == ""
    assert first_stop(Stopper(wrapped, ["stopnow"]), [0, 1, 6]) is None
    assert first_stop(Stopper(wrapped, ["stop now"]), [6, 0, 1, 6]) == (3, 1)
    assert first_stop(Stopper(wrapped, ["stop "]), [6, 0, 2, 6]) == (3, 1)


def test_texts_are_looked_up_once_a_token() -> None:
    tokenizer = byte_level()
    stopper = Stopper(tokenizer, HH)
    tokens = tokenizer.encode("no colon here, none at all")
    assert not any(stopper.may_complete(token) for token in tokens)
    decode, calls = tokenizer.decode, []
    tokenizer.decode = lambda *args, **kwargs: calls.append(args) or decode(*args, **kwargs)
    assert first_stop(stopper, tokens) is None
    assert not calls
