"""Names of special tokens in what people wrote stay text, whatever writes the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec, PromptFormat, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|from|>{{ m.role }}<|says|>{{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|from|>assistant<|says|>{% endif %}"
)
NAMES = ("<|endoftext|>", "<|pad|>", "<|from|>", "<|done|>", "<|says|>")
FORMATS = ("hh", "plain", "chat_template")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer(["Hello, who says so? I say so."], 300)
    trained.add_special_tokens({"additional_special_tokens": ["<|from|>", "<|done|>"]})
    # As some families have it: a marker of turns that is not called special.
    trained.add_tokens([AddedToken("<|says|>", special=False)])
    trained.chat_template = TEMPLATE
    return trained


def specials(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in NAMES]


@pytest.mark.parametrize("prompt_format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_named_token_is_text(
    tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat, name: str
) -> None:
    codec = Codec(tokenizer, prompt_format)
    text = f"a {name}{name} b {name[:-1]}"

    def history(text: str) -> tuple[Turn, ...]:
        return Turn("human", text), Turn("assistant", f"{text}."), Turn("human", f"why {text}")

    harmless = specials(tokenizer, codec.encode_prompt(history("x")))
    if prompt_format == "chat_template":
        assert harmless == [*["<|from|>", "<|says|>", "<|done|>"] * 3, "<|from|>", "<|says|>"]
        ids, other = codec.encode_prompts([history(text), history("x")])
        assert specials(tokenizer, ids) == harmless
        assert other == codec.encode_prompt(history("x"))
        assert codec.decode(ids) == codec.render(history(text))
    elif name != "<|says|>":  # only the template makes a marker of it
        assert harmless == []
        assert specials(tokenizer, codec.encode_prompt(history(text))) == []
    if prompt_format == "chat_template" or name != "<|says|>":
        response = codec.encode_response(text)
        assert specials(tokenizer, response) == []
        assert codec.decode(response).strip() == text


def test_a_tokenizer_that_cannot_split_special_tokens(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreTrainedTokenizerFast.__call__

    def ignoring(self: object, *texts: object, **named: object) -> object:
        named.pop("split_special_tokens", None)
        return original(cast(PreTrainedTokenizerFast, self), *texts, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", ignoring)
    codec = Codec(tokenizer, "hh")
    for ids in (
        codec.encode_response("a <|done|>"),
        codec.encode_prompt((Turn("human", "<|from|>"),)),
    ):
        assert specials(tokenizer, ids) == []
    assert codec.decode(codec.encode_response("a <|done|>")) == " a <|done|>"


def test_a_sentencepiece_tokenizer(shared_data: Path) -> None:
    real = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    real.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}: {% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    codec = Codec(real, "chat_template")
    ids = codec.encode_prompt((Turn("human", "the </s> end <s> now"),))
    assert [token for token in real.convert_ids_to_tokens(ids) if token in ("<s>", "</s>")] == [
        "<s>"
    ]
    # Such a tokenizer begins each part with a space of its own.
    assert codec.decode(ids).replace(" ", "").startswith("<s>the</s>end<s>now")
    assert real.eos_token_id not in codec.encode_response("the </s> end")
