r"""Parsing of data sets: JSON lines to records, records to rows, HH's marked dialogues to turns.

A record may have any of the `FORMATS`. Anthropic's HH data marks turns by `\n\nHuman:` and
`\n\nAssistant:`. Real files hold two turns of one speaker in a row, empty responses, markers inside
a line (part of the text, since a marker follows a blank line) and pairs whose sides differ before
their last response.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.data.rows import Demonstration, History, Preference, Prompt, Role, Row, Turn
from rlhf_exp.errors import UserError

FORMATS = (
    '{"chosen", "rejected"}, {"prompt", "chosen", "rejected"}, {"prompt", "response"}, '
    '{"dialogue"}, {"text"} or {"prompt"}'
)
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_LOOSE_MARKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "human", "Assistant": "assistant"}


@dataclass(frozen=True)
class UnreadableLine:
    """A line that is not valid JSON, and why."""

    reason: str


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", record) for every line that is not blank; lines count from 1.

    Args:
        path: a `.jsonl` file, or `.gz` of one.
        key: the config key that names the file, for errors.

    Raises:
        UserError: the file is missing, or cannot be read to its end.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"{key}: no such file: {path} (found {kind}); give a .jsonl or .jsonl.gz")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _record(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path} cannot be read after line {number}: {error}") from error


def _record(line: bytes) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return UnreadableLine(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return UnreadableLine(f"not UTF-8: byte {error.start} of the line")


def parse_row(record: object, origin: str) -> Row:
    r"""Return the row in `record`; its fields decide its kind.

    Other fields are ignored. A text with HH's markers is a dialogue; a prompt without any is one
    human turn.

    Raises:
        ValueError: the record cannot be used; the message says why.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object was expected, found {type(record).__name__}")
    if "chosen" in record and "rejected" in record:
        return _preference(record, origin)
    if "prompt" in record and "response" in record:
        response = _text(record, "response").strip()
        return _demonstration(parse_prompt(_text(record, "prompt")), response, origin)
    for name in ("dialogue", "text"):
        if name in record:
            return _demonstration(*split_dialogue(parse_dialogue(_text(record, name))), origin)
    if "prompt" in record:
        return Prompt(parse_prompt(_text(record, "prompt")), None, origin)
    fields = ", ".join(map(str, record)) or "none"
    raise ValueError(f"fields found: {fields}; expected {FORMATS}")


def _preference(record: Mapping[str, object], origin: str) -> Preference:
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if "prompt" not in record:
        return Preference(*split_pair(chosen, rejected), origin)
    history = parse_prompt(_text(record, "prompt"))
    chosen, rejected = chosen.strip(), rejected.strip()
    if chosen == rejected:
        raise ValueError("the responses are identical" if chosen else "both responses are empty")
    return Preference(history, chosen, rejected, origin)


def _demonstration(history: History, response: str, origin: str) -> Demonstration:
    if not response:
        raise ValueError("the response is empty")
    return Demonstration(history, response, origin)


def _text(record: Mapping[str, object], name: str) -> str:
    value = record[name]
    if (
        isinstance(value, Mapping) and "text" in value
    ):  # RealToxicityPrompts' prompts come with scores
        value = value["text"]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {type(value).__name__}, text was expected")
    return value


def parse_prompt(text: str) -> History:
    """Return the history in `text`: a marked dialogue, or plain text as one human turn.

    Raises:
        ValueError: the text or the last human turn is empty, or the assistant spoke last.
    """
    if not _MARKER.match(text):
        return require_human_turn((Turn("human", text.strip()),))
    turns = parse_dialogue(text)
    if turns[-1] == Turn("assistant", ""):
        turns = turns[:-1]
    return require_human_turn(turns)


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """Return the turns of a marked dialogue; a last turn that only cues the assistant is empty.

    Raises:
        ValueError: the text does not begin with a marker.
    """
    parts = _MARKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"no `Human:` or `Assistant:` at the beginning of {_excerpt(text)}")
    return tuple(
        Turn(_ROLES[speaker], turn_text.strip())
        for speaker, turn_text in zip(parts[1::2], parts[2::2], strict=True)
    )


def format_dialogue(history: History) -> str:
    """Return a history as a marked dialogue that ends with the assistant's marker."""
    return format_turns(history) + "\n\nAssistant:"


def format_turns(turns: Sequence[Turn]) -> str:
    """Return turns with HH's markers, whatever the run's prompt format."""
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


def split_pair(chosen: str, rejected: str) -> tuple[History, str, str]:
    """Return the history that two dialogues share, and the rest of each: chosen, then rejected.

    The history is the longest common beginning that ends with a human turn. The rest is one
    response, or, if a side has several more turns, all of them with their markers.

    Raises:
        ValueError: the dialogues share no history, do not differ, or are empty after it.
    """
    sides = parse_dialogue(chosen), parse_dialogue(rejected)
    shared_turns = 0
    for number, (left, right) in enumerate(zip(*sides, strict=False), 1):
        if left != right:
            break
        if left.role == "human":
            shared_turns = number
    if not shared_turns:
        raise ValueError("the two dialogues share no human turn to begin with")
    history = require_human_turn(sides[0][:shared_turns])
    chosen_response, rejected_response = (_continuation(turns[shared_turns:]) for turns in sides)
    if chosen_response == rejected_response:
        raise ValueError(
            "both responses are empty" if not chosen_response else "the responses are identical"
        )
    return history, chosen_response, rejected_response


def _continuation(turns: tuple[Turn, ...]) -> str:
    if not turns:
        return ""
    if turns[0].role != "assistant":
        raise ValueError("a human turn stands where the response should be")
    return turns[0].text + format_turns(turns[1:])


def _excerpt(text: str) -> str:
    return repr(text[:40]) + ("..." if len(text) > 40 else "")


def split_turns(prompt: str) -> list[tuple[str, str]]:
    """Return (speaker, text) of each turn for display; text before any marker has the speaker "".

    The empty turn at the end, which asks the model to speak, is left out. Unlike `parse_dialogue`
    this never fails. Text that imitates markers looks like turns, as it does to the model.
    """
    parts = _LOOSE_MARKER.split(prompt)
    preamble, marked = parts[0].strip(), parts[1:]
    turns = [("", preamble)] if preamble or not marked else []
    turns += [(role, text.strip()) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    return [turn for number, turn in enumerate(turns) if turn[1] or number < len(turns) - 1]
