"""A tokenizer's chat template, checked against itself.

A prompt must end where the template puts the answer: for each shape of dialogue (the roles of its
turns), `render(history + [answer])` must be `prompt(history) + answer + end`, with one `end` for
all shapes. Templates that ignore the generation prompt are completed by the difference of the two
renderings; those that change an answer, or refuse a dialogue, are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, nodes

from rlhf_exp.data.rows import History, Role, Turn
from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FROZEN_DATE = date(2024, 7, 26)
"""The day that templates print which ask for today's; Llama's print it where they know no other."""

_CHAT_ROLES: dict[Role, str] = {"system": "system", "human": "user", "assistant": "assistant"}
Shape = tuple[Role, ...]
"""The roles of a dialogue's turns."""
_DIRECTIVES = "aAwdbBmyYHIpMSfjUW"
# Texts with whatever a template might trim, escape, split at or cut. No two of them are equal.
_CHARACTERS = "Aa1 \"'`\\ <b>&amp; {x} {{y}} %s  two\tspaces\n\nnew - line é東🍅 ."
_LONG = " and so on" * 300
_SHOWN = 60
"""Most characters of a template's text in a message."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around the answer to a dialogue of one shape.

    Attributes:
        cued: Whether the prompt is rendered with the generation prompt.
        cue: The text between that rendering and the answer.
        lead: The space that this text ends with, which begins the answer then; or nothing.
        end: The text after the answer.
    """

    cued: bool
    cue: str
    lead: str
    end: str


class ChatTemplate:
    """Renders dialogues by a tokenizer's chat template.

    Attributes:
        lead: The text that begins an answer, before its content: a space, or nothing.
        end: The text that ends an answer.
        warnings: What a user should know of the template, a sentence each.

    Args:
        tokenizer: Has a chat template.

    Raises:
        UserError: It refuses a dialogue of one turn, or changes or leaves out the answer to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "the tokenizer"
        self.text = frozen_template(tokenizer)
        self._frames: dict[Shape, Frame | str] = {}
        self._words = _words_of(self.text)
        frame = self._derived(("human",))
        if isinstance(frame, str):
            raise UserError(
                f"{self._name}: its chat template cannot say one human turn and its answer: "
                f"{frame}; mend chat_template, or use data.format=hh"
            )
        self._frames["human",] = frame
        self.lead, self.end = frame.lead, frame.end
        self.warnings = list(self._noteworthy(frame))

    def prompt(self, history: History) -> str:
        """Return the text of a prompt, up to where the answer begins.

        Raises:
            UserError: The template refuses the dialogue.
        """
        frame = self._frame(history)
        if isinstance(frame, str):
            raise UserError(f"{self._name}: its chat template cannot say a dialogue: {frame}")
        try:
            return (self._render(history, frame.cued) + frame.cue).removesuffix(frame.lead)
        except TemplateRefusal as error:
            raise UserError(
                f"{self._name}: its chat template cannot say a dialogue: {error}"
            ) from error

    def refusal(self, history: History, answers: Sequence[str]) -> str | None:
        """Return why the template cannot say a dialogue with one of these answers, or `None`.

        Args:
            history: The dialogue.
            answers: Texts without white space at their ends.
        """
        frame = self._frame(history)
        if isinstance(frame, str):
            return frame
        texts = [turn.text for turn in history]
        # What a template may do depends on a text only by the words that the template itself has.
        unusual = [
            answer
            for answer in answers or ("x",)
            if not all([*texts, answer])
            or any(word in text for word in self._words for text in (*texts, answer))
        ]
        try:
            for answer in unusual:
                before = self._render(history, frame.cued) + frame.cue
                if self._render(history, False, answer) != before + answer + frame.end:
                    return "it changes the text of this dialogue"
        except TemplateRefusal as error:
            return str(error)
        return None

    def _frame(self, history: History) -> Frame | str:
        """Return what stands around the answer to a dialogue, or why there can be none."""
        shape = tuple(turn.role for turn in history)
        if shape not in self._frames:
            frame = self._derived(shape)
            if isinstance(frame, Frame) and (frame.lead, frame.end) != (self.lead, self.end):
                frame = (
                    f"after {_named(shape)} an answer stands between {_shown(frame.lead)} and "
                    f"{_shown(frame.end)}, otherwise between {_shown(self.lead)} and "
                    f"{_shown(self.end)}"
                )
            self._frames[shape] = frame
        return self._frames[shape]

    def _derived(self, shape: Shape) -> Frame | str:
        """Return what stands around the answer to dialogues of a shape, or why nothing can."""
        texts = [f"Turn {number} {_CHARACTERS} {number}." for number in range(len(shape))]
        history = list(zip(shape, texts, strict=True))
        answers = [f"One {_CHARACTERS} 1.", f"Two{_LONG} 2."]
        try:
            whole = [self._rendered(history, False, answer) for answer in answers]
            cued, plain = self._rendered(history, True), self._rendered(history, False)
        except TemplateRefusal as error:
            return str(error)
        parts = [text.split(answer) for text, answer in zip(whole, answers, strict=True)]
        if any(len(part) != 2 for part in parts):
            times = "twice" if any(len(part) > 2 for part in parts) else "changed or not at all"
            return f"it writes the answer after {_named(shape)} {times}"
        if parts[0] != parts[1]:
            return f"what it writes around an answer after {_named(shape)} depends on the answer"
        head, end = parts[0]
        if shape[0] == "system" and texts[0] not in head:
            return "it changes a system turn, or leaves it out"
        for rendering, with_cue in ((cued, True), (plain, False)):
            if head.startswith(rendering):
                # Tokenizers join a space to the word after it, not to the prompt before it.
                lead = " " if head.endswith(" ") else ""
                return Frame(with_cue, head.removeprefix(rendering), lead, end)
        return (
            f"its generation prompt after {_named(shape)} is not where it puts the answer: "
            f"{_shown(cued[-_SHOWN:])} and {_shown(head[-_SHOWN:])}"
        )

    def _render(self, history: History, cued: bool, answer: str | None = None) -> str:
        return self._rendered([(turn.role, turn.text) for turn in history], cued, answer)

    def _rendered(
        self, turns: Sequence[tuple[Role, str]], cued: bool, answer: str | None = None
    ) -> str:
        messages = _messages(turns)
        if answer is not None:
            messages.append({"role": _CHAT_ROLES["assistant"], "content": answer})
        return render_messages(self._tokenizer, messages, cued, self.text)

    def _noteworthy(self, frame: Frame) -> list[str]:
        warnings = []
        template = str(self._tokenizer.get_chat_template())
        if self.text != template:
            warnings.append(
                f"{self._name}: its chat template prints today's date; it is held at "
                f"{FROZEN_DATE}, so that results do not change from day to day"
            )
        if not frame.cued or frame.cue.strip():
            ends = "leaves out" if frame.cued else "is not"
            warnings.append(
                f"{self._name}: the generation prompt of its chat template {ends} what stands "
                f"before an answer in it; prompts end with {_shown(frame.cue)}, where answers begin"
            )
        return warnings


def messages_of_history(history: History) -> list[dict[str, str]]:
    """Return a dialogue as messages with `role` and `content`."""
    return _messages([(turn.role, turn.text) for turn in history])


def history_of_messages(messages: Sequence[Mapping[str, str]]) -> History:
    """Return the dialogue that `messages_of_history` made messages of."""
    roles = {name: role for role, name in _CHAT_ROLES.items()}
    return tuple(Turn(roles[message["role"]], message["content"]) for message in messages)


def _messages(turns: Iterable[tuple[Role, str]]) -> list[dict[str, str]]:
    return [{"role": _CHAT_ROLES[role], "content": text} for role, text in turns]


class TemplateRefusal(Exception):
    """A template does not render a dialogue; the message is its own."""


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    cued: bool = False,
    template: str | None = None,
) -> str:
    """Return messages as a chat template writes them.

    Args:
        tokenizer: Has the template, and the special tokens that it writes.
        messages: Dicts with `role` and `content`.
        cued: Whether to add the generation prompt.
        template: Result of `frozen_template`, if it is known.

    Raises:
        TemplateRefusal: The template refuses the messages.
    """
    template = frozen_template(tokenizer) if template is None else template
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=cued,
        )
    except TemplateError as error:
        raise TemplateRefusal(_first_line(error)) from error
    except Exception as error:  # templates are programs, which fail in any way
        raise TemplateRefusal(f"{type(error).__name__}: {_first_line(error)}") from error
    return str(text)


def frozen_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a tokenizer's chat template, in which today is always the same day.

    Raises:
        UserError: It has no template, or only ones with names of their own.
    """
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: none of its chat templates can be used: "
            f"{_first_line(error)}"
        ) from error
    if "strftime_now" not in template:
        return template
    replaced = "".join(
        f".replace('%{mark}', '{FROZEN_DATE.strftime(f'%{mark}')}')"
        f".replace('%-{mark}', '{FROZEN_DATE.strftime(f'%{mark}').lstrip('0') or '0'}')"
        for mark in _DIRECTIVES
    )
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}"
    return macro + template


def _words_of(template: str) -> tuple[str, ...]:
    """Return the texts that a template compares with, or splits and replaces at.

    White space is left out: the texts that a template is tried on have all kinds of it.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    # A block that transformers adds to the language.
    bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        constants = environment.parse(bare).find_all(nodes.Const)
    except TemplateError:
        return ("",)  # every text is tried
    words = {node.value for node in constants if isinstance(node.value, str) and node.value.strip()}
    return tuple(sorted(words))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _named(shape: Shape) -> str:
    if shape == ("human",):
        return "one human turn"
    return f"turns of {', '.join(shape)}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}")
