"""Tokenizers trained on the data at hand.

Dialogues to ids and back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec, PromptFormat, train_tokenizer
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
    first, second = (train_tokenizer(iter(TEXTS), 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_end_and_padding_are_two_tokens_and_nothing_is_added() -> None:
    tokenizer = train_tokenizer(["grow tomatoes and tomatoes and tomatoes"] * 20, 270)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token_id is None
    ids = tokenizer("Water")["input_ids"]
    assert tokenizer.eos_token_id not in ids


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="258"):
        train_tokenizer(TEXTS, 257)


TALK = (Turn("human", "hi there"), Turn("assistant", "yes"), Turn("human", "what now?"))
TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Human: hi there Assistant: what now, yes"] * 9, 300)


def test_hh_writes_its_markers_and_stops_at_them(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = Codec(tokenizer, "hh")
    text = "\n\nHuman: hi there\n\nAssistant: yes\n\nHuman: what now?\n\nAssistant:"
    assert codec.render(TALK) == text
    assert codec.decode(codec.encode_prompt(TALK)) == text
    assert codec.stop_strings == ("Human:", "human:", "Assistant:", "assistant:")


def test_prompt_and_response_join_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = Codec(tokenizer, "hh")
    joined = codec.encode_prompt(TALK) + codec.encode_response("\n well, yes. ")
    assert codec.decode(joined).endswith("\n\nAssistant: well, yes.")
    assert codec.eos_id not in joined


def test_plain_writes_turns_as_lines(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = Codec(tokenizer, "plain")
    ids = codec.encode_prompt(TALK) + codec.encode_response("yes")
    assert codec.decode(ids) == "hi there\nyes\nwhat now? yes"
    assert codec.stop_strings == ()


def test_chat_template_cues_the_assistant(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    codec = Codec(tokenizer, "chat_template")
    rendered = "<user>hi there</><assistant>yes</><user>what now?</><assistant>"
    assert codec.render(TALK) == f"<|begin|>{rendered}"
    ids = codec.encode_prompt(TALK)
    assert (ids[0], codec.bos_id) == (tokenizer.bos_token_id, tokenizer.bos_token_id)
    assert codec.decode(ids + codec.encode_response("yes")) == f"<|begin|>{rendered}yes"


def test_special_tokens_in_a_users_text_are_only_text(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = Codec(tokenizer, "hh")
    said = (Turn("human", "a <|endoftext|> b"),)
    ids = codec.encode_prompt(said) + codec.encode_response("c <|pad|>")
    assert codec.eos_id not in ids
    assert codec.pad_id not in ids
    assert codec.decode(ids) == "\n\nHuman: a <|endoftext|> b\n\nAssistant: c <|pad|>"


def test_a_tokenizer_that_begins_and_spaces_texts_itself(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    codec = Codec(tokenizer, "hh")
    prompt, response = codec.encode_prompt(TALK[:1]), codec.encode_response("good day")
    assert (prompt[0], prompt.count(1), codec.bos_id) == (1, 1, 1)
    assert 1 not in response
    text = codec.decode(prompt + response)
    assert text.endswith("Human: hi there\n\nAssistant: good day")


def test_pad_falls_back_to_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    assert Codec(tokenizer, "hh").pad_id == tokenizer.eos_token_id


def test_many_at_once_equal_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = Codec(tokenizer, "hh")
    histories, texts = [TALK[:1], TALK], ["yes", "", "what now"]
    assert codec.encode_prompts(histories) == [codec.encode_prompt(h) for h in histories]
    assert codec.encode_responses(texts) == [codec.encode_response(t) for t in texts]
    assert codec.encode_responses([]) == []


def test_digest_changes_with_whatever_changes_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    digest = Codec(tokenizer, "hh").digest
    tokenizer("long text to cut", truncation=True, max_length=2)  # leaves its settings behind
    assert Codec(tokenizer, "hh").digest == digest
    assert Codec(tokenizer, "plain").digest != digest
    assert Codec(train_tokenizer(["other words"] * 9, 300), "hh").digest != digest
    tokenizer.add_tokens(["tomatoes"])
    assert Codec(tokenizer, "hh").digest != digest


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        Codec(tokenizer, "hh")


def test_a_missing_chat_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.format=chat_template"):
        Codec(tokenizer, "chat_template")


def test_an_unknown_format_lists_the_valid_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="hh, chat_template, plain"):
        Codec(tokenizer, "hhh")  # type: ignore[arg-type]


SYSTEM = Turn("system", "Be kind.")


@pytest.mark.parametrize(
    ("prompt_format", "text"),
    [
        (
            "hh",
            "\n\nHuman: Be kind.\n\nhi there\n\nAssistant: yes\n\nHuman: what now?\n\nAssistant:",
        ),
        ("plain", "Be kind.\nhi there\nyes\nwhat now?"),
        (
            "chat_template",
            "<|begin|><system>Be kind.</><user>hi there</><assistant>yes</><user>what now?</>"
            "<assistant>",
        ),
    ],
)
def test_a_system_turn_is_read_by_every_format(
    tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat, text: str
) -> None:
    tokenizer.chat_template = TEMPLATE
    codec = Codec(tokenizer, prompt_format)
    assert codec.refusal((SYSTEM, *TALK), ["yes"]) is None
    assert codec.decode(codec.encode_prompt((SYSTEM, *TALK))) == text
    greeted = (SYSTEM, Turn("assistant", "Hello!"), *TALK)
    assert codec.decode(codec.encode_prompt(greeted)).count("Be kind.") == 1
