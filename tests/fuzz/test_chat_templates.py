"""Random chat templates and random dialogues: what is accepted is the template's own text.

Templates are drawn from a small grammar of what real ones do: trim or cut the content, refuse an
order of roles, print a date, ignore the generation prompt, end turns in several ways.
"""

from __future__ import annotations

from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_exp.data.rows import History, Turn
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.errors import UserError

pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis, of the dev extra")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

CONTENTS = (
    "m.content",
    "m['content'] | trim",
    "m.content.strip()",
    "m.content.split('</t>')[-1]",
    "m.content | replace('ab', 'x')",
    "m.content | replace('Q', '')",
    "(m.content if 'zz' not in m.content else '')",
    "m.content[:700]",
    "m.content | upper",
    "m.content | tojson",
    "m.content | e",
    "m.content ~ ''",
    "m.text",
    "''",
)
BEFORE = (
    "<|{{ m.role }}|>",
    "<|{{ m.role }}|>\n",
    "[{{ m.role[0] }}] ",
    "{{ loop.index }}. ",
    "{{ 'Q: ' if m.role == 'user' else 'A: ' }}",
    "{% if loop.last and m.role == 'assistant' %}<t>\n</t>\n{% endif %}",
    "",
)
AFTER = (
    "<|end|>",
    "<|end|>\n",
    " </s>",
    "\n",
    "",
    "{{ eos_token }}",
    "{% if not loop.last %}<|end|>{% endif %}",
    "{{ '</s>' if m.role == 'assistant' else '' }}",
    "{{ m.content | length }}",
)
CUES = ("<|assistant|>", "<|assistant|>\n", "[a] ", "A: ", "A:", "<t>\n", "", "{{ eos_token }}")
CHECKS = (
    "",
    "{{ strftime_now('%d %b %Y') }}\n",
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
    "{% if messages[0].role != 'system' %}You are kind.\n{% endif %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
    "{{ bos_token }}",
    "{{ messages[1].content[0] }}",
    "{{ nonesuch() }}",
    "{% set n = namespace(x=messages | length) %}{{ n.x }}|",
    "{% for",
)
TAILS = ("{% if add_generation_prompt %}CUE{% endif %}", "", "CUE", "{% if cue %}CUE{% endif %}")
ENDS = ("", "{{ eos_token }}", "{% if not add_generation_prompt %}</s>{% endif %}")


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Draw a chat template."""
    pick = lambda words: draw(st.sampled_from(words))  # noqa: E731
    content = pick(CONTENTS[:6] if draw(st.booleans()) else CONTENTS)
    turn = f"{pick(BEFORE)}{{{{ {content} }}}}{pick(AFTER)}"
    tail = pick(TAILS).replace("CUE", pick(CUES))
    return f"{pick(CHECKS)}{{% for m in messages %}}{turn}{{% endfor %}}{tail}{pick(ENDS)}"


TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="abzQ</t>|\\n \n'\"&{}%[]end", max_size=40),
    st.sampled_from(["ab", "zz", "Q", "</t> x", "<t>", "user", "a" * 800, "<|end|>", "{{ x }}"]),
).map(str.strip)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Draw a dialogue that ends with a human turn."""
    roles = draw(st.lists(st.sampled_from(["human", "assistant"]), max_size=4))
    turns = [Turn(role, draw(TEXTS)) for role in [*roles, "human"]]  # type: ignore[arg-type]
    return tuple(turns)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, and the special tokens of the grammar."""
    made = train_tokenizer(["one two three user assistant"] * 9, 280)
    made.add_special_tokens({"additional_special_tokens": ["<|end|>", "</s>", "<|assistant|>"]})
    return made


def written(codec: Codec, history: History, answer: str) -> str:
    """Return the dialogue and its answer by the library's own rendering of the template."""
    names = {"human": "user", "assistant": "assistant"}
    messages = [{"role": names[turn.role], "content": turn.text} for turn in history]
    messages.append({"role": "assistant", "content": answer})
    return str(codec.tokenizer.apply_chat_template(messages, tokenize=False))


@settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(templates(), st.lists(st.tuples(histories(), TEXTS), min_size=1, max_size=4))
def test_what_is_accepted_is_the_templates_own_text(
    template: str, dialogues: list[tuple[History, str]]
) -> None:
    made = tokenizer()
    made.chat_template = template
    try:
        codec = Codec(made, "chat_template")
    except UserError:
        return
    dated = "strftime_now" in template
    for history, answer in dialogues:
        if codec.refusal(history, [answer]) is not None:
            continue
        prompt, whole = codec.render(history), written(codec, history, answer)
        if dated:  # the library prints today
            prompt, whole = prompt.split("\n", 1)[1], whole.split("\n", 1)[1]
        assert whole.startswith(prompt)
        between = whole.removeprefix(prompt)
        assert between.lstrip(" ").startswith(answer) or between.startswith(answer)
        end = codec.decode([codec.eos_id])
        rest = between.removeprefix(" ").removeprefix(answer)
        # The end of a turn, or a template that has no token for it.
        assert end in rest or any("no token of its own" in text for text in codec.warnings)


@settings(max_examples=2_000, deadline=None, database=None, derandomize=True)
@given(st.text(alphabet="{}% mformessages|.'\"content()[]endifx-+", max_size=60))
def test_no_text_as_a_template_ends_in_a_traceback(template: str) -> None:
    made = tokenizer()
    made.chat_template = template or "x"
    with pytest.raises(UserError):  # by chance none of these writes a dialogue
        Codec(made, "chat_template")
