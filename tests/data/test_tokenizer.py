"""Tokenizers trained on the data at hand."""

from __future__ import annotations

import pytest

from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.errors import UserError

TEXTS = ["How do I grow tomatoes? Water them daily, please."] * 20


def test_any_text_survives_encoding() -> None:
    tokenizer = train_tokenizer(["grow tomatoes and tomatoes and tomatoes"] * 20, 270)
    for text in ("Water them.", " tab\tand\nlines ", "naïve 東京 🍅 \x00"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_vocabulary_is_as_large_as_asked_and_words_become_tokens() -> None:
    tokenizer = train_tokenizer(["grow tomatoes and tomatoes and tomatoes"] * 20, 270)
    assert len(tokenizer) == 270
    assert len(tokenizer(" tomatoes")["input_ids"]) == 1


def test_training_is_deterministic() -> None:
    one, two = (train_tokenizer(iter(TEXTS), 290).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_end_and_padding_are_two_tokens_and_nothing_is_added() -> None:
    tokenizer = train_tokenizer(["grow tomatoes and tomatoes and tomatoes"] * 20, 270)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token_id is None
    ids = tokenizer("Water")["input_ids"]
    assert tokenizer.eos_token_id not in ids


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="258"):
        train_tokenizer(TEXTS, 257)
