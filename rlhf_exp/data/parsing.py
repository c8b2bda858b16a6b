r"""Parsing of texts: HH's marked dialogues to turns, prompts and responses.

Anthropic's HH data marks turns by `\n\nHuman:` and
`\n\nAssistant:`. Real files hold two turns of one speaker in a row, empty responses, markers inside
a line (part of the text, since a marker follows a blank line) and pairs whose sides differ before
their last response.

Others write the markers after one line feed, in small letters or with other line ends, repeat the
prompt or its cue in the responses, or put a text before the first marker. What can be read in one
way only is read so and *noted*; what can be read in several is refused, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from rlhf_exp.data.rows import History, Role, Turn

# What was normalised, as the log says it: "3 rows: ...".
LINE_ENDS = "line ends of marked turns made line feeds"
SPELLING = "markers in another spelling read as markers"
PREAMBLE = "a text before the first marker joined to the first human turn"
REPEATED_PROMPT = "a prompt repeated at the start of a response taken off"
REPEATED_CUE = "a cue (`Assistant:`) at the start of a response taken off"
CUE_IN_TEXT = "a cue (`Assistant:`) at the end of a prompt's text taken off"
SEVERAL_TURNS = "a response cut before a turn of its own"

# White space with a line feed, or with a blank line. It is looked at once, from its beginning: a
# text of nothing but line feeds must not cost the square of its length.
_NEW_LINE = r"(?<!\s)(?=[^\S\n]*\n)\s*+"
_BLANK_LINE = r"(?<!\s)(?=[^\S\n]*\n[^\S\n]*\n)\s*+"
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_STYLES = (
    _MARKER,
    re.compile(rf"(?:\A\s*+|{_BLANK_LINE})(Human|Assistant)[ \t]*:", re.IGNORECASE),
    re.compile(rf"(?:\A\s*+|{_NEW_LINE})(Human|Assistant)[ \t]*:", re.IGNORECASE),
)
"""The spellings of a marker, strictest first."""
_LEADING_MARKER = re.compile(r"\s*(Human|Assistant)[ \t]*:", re.IGNORECASE)
_LINE_MARKER = re.compile(rf"{_NEW_LINE}(Human|Assistant)[ \t]*:", re.IGNORECASE)
_MARKER_AFTER_BLANK_LINE = re.compile(rf"{_BLANK_LINE}(Human|Assistant)[ \t]*:", re.IGNORECASE)
_CARRIAGE_RETURN_MARKER = re.compile(
    r"(?<!\s)(?=[^\S\r]*\r)\s*+(Human|Assistant)[ \t]*:", re.IGNORECASE
)
_LEADING_CUES = re.compile(r"(?:\s*Assistant[ \t]*:)+", re.IGNORECASE)
_CUE_LINE = re.compile(rf"{_NEW_LINE}Assistant[ \t]*:\s*\Z", re.IGNORECASE)
_END_CUE = re.compile(r"\bAssistant[ \t]*:\Z", re.IGNORECASE)
_CUE_IN_LINE = re.compile(r"\sAssistant:\s*\Z")
_MARKER_IN_LINE = re.compile(r"\s(Human|Assistant):\s")
_SYSTEM_TURN = re.compile(r"\A\s*System:(.*?)(?=\n\n(?:Human|Assistant):)", re.DOTALL)
_MARKER_IN_TEXT = re.compile(r"\n\n(Human|Assistant):")
_DISPLAYED_MARKER = re.compile(rf"(?:\A\s*+|{_BLANK_LINE})(Human|Assistant):")
_ROLES: dict[str, Role] = {"human": "human", "assistant": "assistant"}
_SYSTEM_MARKER = "System:"
BYTE_ORDER_MARK = "\ufeff"


def require_difference(chosen: str, rejected: str) -> None:
    """Raise a `ValueError` if the two responses of a pair are the same."""
    if chosen == rejected:
        raise ValueError("the responses are identical" if chosen else "both responses are empty")


class DialogueReader:
    """Reads the texts of one record; `notes` takes what it normalises."""

    def __init__(self, notes: set[str] | None = None) -> None:
        """Start with these notes."""
        self.notes = set() if notes is None else notes

    def prompt(self, text: str) -> History:
        """Return the history in a text: a marked dialogue, or plain text as one human turn.

        Raises:
            ValueError: nothing is asked in it, or its markers can be read in several ways.
        """
        text = self._line_feeds(text)
        if _LEADING_MARKER.match(text):
            return require_human_turn(self._without_cue(self._turns(text)))
        cue = _CUE_LINE.search(text)
        if cue is None and not _MARKER_AFTER_BLANK_LINE.search(text):
            return require_human_turn((Turn("human", text.strip()),))
        turns = self._after_preamble(text)
        if turns:
            return require_human_turn(self._without_cue(turns))
        if cue is not None and not _MARKER_AFTER_BLANK_LINE.search(text[: cue.start()]):
            self.notes.add(CUE_IN_TEXT)
            return require_human_turn((Turn("human", text[: cue.start()].strip()),))
        raise ValueError(
            "the prompt has markers but does not begin with `Human:`: neither one dialogue nor "
            f"plain text ({_excerpt(text)})"
        )

    def dialogue(self, text: str) -> tuple[Turn, ...]:
        """Return the turns of a marked dialogue; one that only cues the assistant is empty.

        Raises:
            ValueError: the text does not begin with a marker, or can be read in several ways.
        """
        text = self._line_feeds(text)
        turns = self._turns(text) if _LEADING_MARKER.match(text) else self._after_preamble(text)
        if not turns:
            raise ValueError(f"no `Human:` or `Assistant:` at the beginning of {_excerpt(text)}")
        return turns

    def response(self, history: History, prompt: str, text: str, name: str) -> str:
        """Return the response in a text that may repeat the prompt, or its cue, before it.

        Raises:
            ValueError: the text is a dialogue that begins with something else.
        """
        text, prompt = self._line_feeds(text).strip(), self._line_feeds(prompt).strip()
        rest = text.removeprefix(prompt)
        if len(rest) < len(text) and (_END_CUE.search(prompt) or _LEADING_CUES.match(rest)):
            self.notes.add(REPEATED_PROMPT)
            cues = _LEADING_CUES.match(rest)
            return rest[cues.end() if cues else 0 :].strip()
        reading, marker = DialogueReader(), _LEADING_MARKER.match(text)
        turns: tuple[Turn, ...] = ()
        if marker is None:
            with suppress(ValueError):
                turns = reading._after_preamble(text)
        elif marker[1].lower() == "human":
            turns = reading._turns(text)
        # The text may repeat the whole history, or the end of it.
        for first in range(len(history)):
            repeated = len(history) - first
            if turns[:repeated] == history[first:] and len(turns) > repeated:
                self.notes |= {REPEATED_PROMPT, *reading.notes}
                return DialogueReader().without_cue(continuation(turns[repeated:]))
        # HH itself has responses such as "Human: What do you mean?", without a turn after it.
        if marker and len(turns) > 1 and turns[1].role == "assistant":
            raise ValueError(f"`{name}` is a dialogue that does not begin with the prompt")
        return self.without_cue(text)

    def without_cue(self, response: str) -> str:
        """Return a response without a cue of the assistant before it."""
        cues = _LEADING_CUES.match(response)
        if cues is None:
            return response
        self.notes.add(REPEATED_CUE)
        return response[cues.end() :].strip()

    def _line_feeds(self, text: str) -> str:
        """Return a text that has markers after carriage returns with line feeds alone."""
        if "\r" not in text or not _CARRIAGE_RETURN_MARKER.search(text):
            return text
        self.notes.add(LINE_ENDS)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _turns(self, text: str) -> tuple[Turn, ...]:
        """Return the turns of a text that begins with a marker.

        Markers are those of the strictest spelling in which the speakers take turns, and of the
        strictest of all where they do so in none.

        Raises:
            ValueError: they take turns in two spellings, and more often in the looser one.
        """
        readings = [_split(style, text) for style in _STYLES]
        exchanges = [turns for turns in readings if len(turns) > 1 and _alternate(turns)]
        if exchanges and len(exchanges[-1]) > len(exchanges[0]):
            raise ValueError(
                "some markers follow a blank line, others a line feed or in small letters; mark "
                "all turns alike"
            )
        turns = exchanges[0] if exchanges else next(filter(None, readings))
        if turns != readings[0]:
            self.notes.add(SPELLING)
        return turns

    def _after_preamble(self, text: str) -> tuple[Turn, ...]:
        """Return the turns of a dialogue with a text before its first marker; none if it is none.

        The text is for the model to heed, as a system prompt is, and becomes part of the first
        human turn.
        """
        first = _STYLES[-1].search(text)
        if first is None:
            return ()
        reading = DialogueReader()
        turns = reading._turns(text[first.start() :])
        if len(turns) < 2 or not _alternate(turns):
            return ()
        self.notes |= {PREAMBLE, *reading.notes}
        opening = f"{text[: first.start()].strip()}\n\n{turns[0].text}".strip()
        return (Turn("human", opening), *turns[1:])

    def _without_cue(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Return turns without the cue at their end, which may stand in a human turn's last line.

        Raises:
            ValueError: the only turn has more markers inside its lines.
        """
        if turns[-1].role == "assistant":
            return _without_end_cues(turns)
        text = turns[-1].text
        cue = _CUE_IN_LINE.search(text)
        if cue is not None:
            self.notes.add(CUE_IN_TEXT)
            text = text[: cue.start()].strip()
        if len(turns) == 1 and _MARKER_IN_LINE.search(text):
            raise ValueError(
                f"markers stand inside a line of {_excerpt(text)}; begin turns after a blank line"
            )
        return (*turns[:-1], Turn("human", text))


def _split(style: re.Pattern[str], text: str) -> tuple[Turn, ...]:
    """Return the turns by the markers of a style; none if the text does not begin with one."""
    parts = style.split(text)
    if len(parts) < 3 or parts[0].strip():
        return ()
    return tuple(
        Turn(_ROLES[speaker.lower()], turn_text.strip())
        for speaker, turn_text in zip(parts[1::2], parts[2::2], strict=True)
    )


def _alternate(turns: tuple[Turn, ...]) -> bool:
    """Return whether the speakers take turns, from the human on."""
    return turns[0].role == "human" and all(
        first.role != second.role for first, second in pairwise(turns)
    )


def _without_end_cues(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    while turns and turns[-1] == Turn("assistant", ""):
        turns = turns[:-1]
    return turns


def parse_prompt(text: str) -> History:
    """Return the history in a text of `format_dialogue`, or plain text as one human turn.

    Raises:
        ValueError: the text or the last human turn is empty, or the assistant spoke last.
    """
    system = _SYSTEM_TURN.match(text)
    if system is not None:
        turns = _split(_MARKER, text[system.end() :])
        return require_human_turn((Turn("system", system[1].strip()), *_without_end_cues(turns)))
    turns = _split(_MARKER, text) or (Turn("human", text.strip()),)
    return require_human_turn(_without_end_cues(turns))


def format_dialogue(history: History) -> str:
    """Return a history as a marked dialogue that ends with the assistant's marker."""
    return format_turns(history) + "\n\nAssistant:"


def format_turns(turns: Sequence[Turn]) -> str:
    """Return turns with HH's markers, and `System:`, whatever the run's prompt format."""
    return "".join(f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in turns)


def require_human_turn(turns: tuple[Turn, ...]) -> History:
    """Return `turns` if they end with a human turn that can be answered.

    Raises:
        ValueError: the last turn is not the human's, or empty.
    """
    if not turns or turns[-1].role != "human":
        raise ValueError("the prompt does not end with a human turn")
    if not turns[-1].text:
        raise ValueError("the prompt's last human turn is empty")
    return turns


def split_dialogue(turns: tuple[Turn, ...]) -> tuple[History, str]:
    """Return a dialogue's history and its last response.

    Raises:
        ValueError: it does not end with a response to a human turn.
    """
    if turns[-1].role != "assistant":
        raise ValueError("the dialogue does not end with an assistant turn")
    return require_human_turn(turns[:-1]), turns[-1].text


def split_pair(
    chosen: str, rejected: str, notes: set[str] | None = None
) -> tuple[History, str, str]:
    """Return the history that two dialogues share, and the rest of each: chosen, then rejected.

    The history is the longest common beginning that ends with a human turn. The rest is one
    response, or, if a side has several more turns, all of them with their markers. `notes` takes
    what was normalised.

    Raises:
        ValueError: the dialogues share no history, do not differ, or are empty after it.
    """
    reading = DialogueReader(notes)
    return split_turn_pair(reading.dialogue(chosen), reading.dialogue(rejected), reading)


def split_turn_pair(
    chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], reading: DialogueReader
) -> tuple[History, str, str]:
    """Return what `split_pair` does, of dialogues in turns.

    Raises:
        ValueError: as there.
    """
    sides = chosen, rejected
    shared_turns = 0
    for number, (left, right) in enumerate(zip(*sides, strict=False), 1):
        if left != right:
            break
        if left.role == "human":
            shared_turns = number
    if not shared_turns:
        raise ValueError("the two dialogues share no human turn to begin with")
    history = require_human_turn(sides[0][:shared_turns])
    chosen_response, rejected_response = (
        reading.without_cue(continuation(turns[shared_turns:])) for turns in sides
    )
    require_difference(chosen_response, rejected_response)
    return history, chosen_response, rejected_response


def continuation(turns: tuple[Turn, ...]) -> str:
    """Return turns that go on after a history as one response, later ones with their markers.

    Raises:
        ValueError: the first is not the assistant's.
    """
    if not turns:
        return ""
    if turns[0].role != "assistant":
        raise ValueError("a human turn stands where the response should be")
    return turns[0].text + format_turns(turns[1:])


def names_a_turn(text: str) -> bool:
    """Return whether a turn's text holds a marker, at which a marked dialogue would be split."""
    return _MARKER_IN_TEXT.search(text) is not None


def end_of_response(text: str) -> int | None:
    """Return where a response ends that goes on with turns of its own; `None` if it does not.

    A turn begins with a marker after a blank line, or, if an exchange follows, after a line feed.
    """
    after_blank_line = _MARKER_AFTER_BLANK_LINE.search(text)
    ends = [after_blank_line.start()] if after_blank_line else []
    markers = list(_LINE_MARKER.finditer(text))
    for first, second in pairwise(markers):
        if (first[1].lower(), second[1].lower()) == ("human", "assistant"):
            ends.append(first.start())
            break
    return min(ends, default=None)


def _excerpt(text: str) -> str:
    return repr(text[:40]) + ("..." if len(text) > 40 else "")


def split_turns(prompt: str) -> list[tuple[str, str]]:
    """Return (speaker, text) of each turn for display; text before any marker has the speaker "".

    The empty turn at the end, which asks the model to speak, is left out. Unlike a
    `DialogueReader` this never fails. Text that imitates markers looks like turns, as it does to
    the model.
    """
    parts = _DISPLAYED_MARKER.split(prompt)
    preamble, marked = parts[0].strip(), parts[1:]
    turns = [("", preamble)] if preamble or not marked else []
    if marked and preamble.startswith(_SYSTEM_MARKER):
        turns = [("System", preamble.removeprefix(_SYSTEM_MARKER).strip())]
    turns += [(role, text.strip()) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    return [turn for number, turn in enumerate(turns) if turn[1] or number < len(turns) - 1]
