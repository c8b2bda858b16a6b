"""Chat templates against themselves: a prompt ends where the same template puts the answer."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_exp.data.chat_template import ChatTemplate
from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.errors import UserError

ASKED = (Turn("human", "How are you?"),)
TALK = (*ASKED, Turn("assistant", "Well."), Turn("human", "And now?"))
TWICE = (*ASKED, Turn("human", "Hello?"))

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNCUED = MARKED.split("{% if add")[0]
BRACKETS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[Q] {{ m.content | trim }} [/Q]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
CLOSED = MARKED.replace("{% endif %}", "{% else %}</s>{% endif %}")
THINKING = MARKED.replace(
    "<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}"
).replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EMPTY_THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n</think>\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["How are you? Well. And now?"] * 9, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "</s>"]})
    tokenizer.chat_template = template
    return tokenizer


# (template, what SFT reads up to the end of the answer, by hand)
SAID = [
    (MARKED, "<|user|>\nHow are you?<|end|>\n<|assistant|>\nFine.<|end|>"),
    (UNCUED, "<|user|>\nHow are you?<|end|>\n<|assistant|>\nFine.<|end|>"),
    (CLOSED, "<|user|>\nHow are you?<|end|>\n<|assistant|>\nFine.<|end|>"),
    (SPACED, "user: How are you?</s>\nassistant: Fine.</s>"),
    (BRACKETS, "[Q] How are you? [/Q] Fine. </s>"),
    (THINKING, "<|user|>\nHow are you?<|end|>\n<|assistant|>\nFine.<|end|>"),
    (
        EMPTY_THOUGHT,
        "<|user|>\nHow are you?<|end|>\n<|assistant|>\n<think>\n</think>\nFine.<|end|>",
    ),
]


@pytest.mark.parametrize(("template", "text"), SAID)
def test_prompt_answer_and_end_are_the_templates_own_text(template: str, text: str) -> None:
    codec = Codec(tokenizer_with(template), "chat_template")
    ids = [*codec.encode_prompt(ASKED), *codec.encode_response(" Fine.\n"), codec.eos_id]
    assert codec.decode(ids) == text
    assert codec.decode([codec.eos_id]) in ("<|end|>", "</s>"), "the template's own, not the eos"
    assert codec.end_ids == {codec.eos_id, codec.tokenizer.eos_token_id}
    assert not codec.render(ASKED).endswith(" "), "a space belongs to the word after it"


def test_the_end_of_a_turn_is_one_token(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    tokenizer.chat_template = MARKED
    codec = Codec(tokenizer, "chat_template", [2, 7])
    assert codec.eos_id == tokenizer.eos_token_id
    assert codec.stop_strings == ("<|end|>",), "this tokenizer has no such token"
    assert "holds no token of its own" in codec.warnings[0]
    assert codec.end_ids == {2, 7}
    # It begins each text with a space, which the template does not have after its cue.
    ids = codec.encode_prompt(ASKED) + codec.encode_response("Fine.")
    assert codec.decode(ids).endswith("<|assistant|>\nFine.")
    tokenizer.chat_template = BRACKETS
    codec = Codec(tokenizer, "chat_template")
    ids = codec.encode_prompt(ASKED) + codec.encode_response("Fine.")
    whole = tokenizer("[Q] How are you? [/Q] Fine. ", add_special_tokens=False)["input_ids"]
    assert ids == whole, "prompt and response join as the tokenizer joins them"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, []),
        (BRACKETS, []),
        (UNCUED, [r"leaves out", r"<|assistant|>\n'"]),
        (THINKING, [r"is not what stands before an answer", r"<|assistant|>\n'"]),
        ("{{ strftime_now('%d %b %Y') }}\n" + MARKED, ["prints today's date", "2024-07-26"]),
    ],
)
def test_what_a_user_should_know_is_said(template: str, expected: list[str]) -> None:
    warnings = Codec(tokenizer_with(template), "chat_template").warnings
    assert len(warnings) == bool(expected)
    assert all(word in warnings[0] for word in expected)


@pytest.mark.parametrize("directives", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A %-m/%y %H:%M"])
def test_today_is_always_the_same_day(directives: str) -> None:
    template = ChatTemplate(tokenizer_with(f"{{{{ strftime_now('{directives}') }}}}|{MARKED}"))
    printed = template.prompt(ASKED).split("|")[0]
    assert printed == date(2024, 7, 26).strftime(directives)


def test_a_dialogue_that_the_template_refuses() -> None:
    template = ChatTemplate(tokenizer_with(BRACKETS))
    assert template.refusal(TALK, ["Fine.", ""]) is None
    assert template.refusal(TWICE, ["Fine."]) == "roles must alternate"
    with pytest.raises(UserError, match="cannot say a dialogue: roles must alternate"):
        template.prompt(TWICE)


def test_texts_that_the_template_would_change() -> None:
    template = ChatTemplate(tokenizer_with(THINKING))
    assert template.refusal(ASKED, ["Fine."]) is None
    changed = "it changes the text of this dialogue"
    assert template.refusal(ASKED, ["Fine.", "Hm </think> fine."]) == changed
    silent = ChatTemplate(
        tokenizer_with(MARKED.replace("<|end|>\n{%", "{{ '<|end|>\n' if m.content }}{%"))
    )
    assert silent.refusal(ASKED, ["Fine."]) is None
    assert silent.refusal(ASKED, [""]) == changed


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in", "unexpected 'end of template'"),
        ("{{ messages.nonesuch.content }}", "has no attribute 'nonesuch'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ raise_exception('a system turn first') }}", "a system turn first"),
        (MARKED.replace("m.content", "m.content | upper"), "changed or not at all"),
        (MARKED.replace("m.content", "m.content[:500]"), "changed or not at all"),
        (MARKED.replace("m.content", "m.content ~ m.content"), "twice"),
        (MARKED.replace("<|end|>", "{{ m.content | length }}"), "depends on the answer"),
        (MARKED + "{{ range(9) | join }}", "its generation prompt"),
    ],
)
def test_a_template_that_contradicts_itself_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UserError, match="cannot say one human turn") as refused:
        Codec(tokenizer_with(template), "chat_template")
    assert reason in str(refused.value)
    assert "data.format=hh" in str(refused.value)


def test_an_end_of_its_own_after_some_dialogues_only() -> None:
    odd = MARKED.replace("<|end|>", "{{ '<|end|>' if messages | length < 3 else '</s>' }}")
    template = ChatTemplate(tokenizer_with(odd))
    assert template.refusal(ASKED, []) is None
    reason = template.refusal(TALK, [])
    assert reason is not None
    assert "between '' and '</s>\\n', otherwise between '' and '<|end|>\\n'" in reason


def test_a_template_of_several_names() -> None:
    tokenizer = tokenizer_with(MARKED)
    tokenizer.chat_template = {"tools": "{{ 1 }}", "default": MARKED}
    assert ChatTemplate(tokenizer).prompt(ASKED).endswith("<|assistant|>\n")
    tokenizer.chat_template = {"tools": "{{ 1 }}", "rag": MARKED}
    with pytest.raises(UserError, match="none of its chat templates can be used"):
        ChatTemplate(tokenizer)


def test_a_system_turn_that_a_template_leaves_out_or_refuses() -> None:
    told = (Turn("system", "Be kind."), *ASKED)
    silent = MARKED.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    assert ChatTemplate(tokenizer_with(MARKED)).refusal(told, ["Fine."]) is None
    reason = ChatTemplate(tokenizer_with(silent)).refusal(told, ["Fine."])
    assert reason == "it changes a system turn, or leaves it out"
    assert ChatTemplate(tokenizer_with(silent)).refusal(ASKED, ["Fine."]) is None
    assert ChatTemplate(tokenizer_with(BRACKETS)).refusal(told, ["."]) == "roles must alternate"
