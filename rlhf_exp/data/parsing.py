r"""One record of a file or data set to one row, whichever of the known formats it has.

Dialogues as Anthropic's HH data writes them: turns marked `\n\nHuman:` and `\n\nAssistant:`.

Real files hold two turns of one speaker in a row, empty responses, markers inside a line (part of
the text, since only the blank line before it makes a marker) and pairs whose sides part ways
earlier than at their last response.

JSON lines, plain or gzipped, with the number of every line.

A prompt as turns, where it is written as a dialogue of `Human:` and `Assistant:`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.data.rows import Demonstration, History, Preference, Prompt, Role, Row, Turn
from rlhf_exp.errors import UserError

FORMATS = (
    '{"chosen", "rejected"}, {"prompt", "chosen", "rejected"}, {"prompt", "response"}, '
    '{"dialogue"}, {"text"} or {"prompt"}'
)


def parse_row(record: object, origin: str) -> Row:
    r"""Return the row that `record` holds, by the fields it has.

    Fields that are not needed are ignored. A text with HH's markers is a dialogue; a prompt without
    any is one human turn.

    Raises:
        ValueError: why the record cannot be used.
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
        return Preference(*pair_from_dialogues(chosen, rejected), origin)
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
    if isinstance(value, Mapping) and "text" in value:  # prompts that come with their scores
        value = value["text"]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {type(value).__name__}, text was expected")
    return value


_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "human", "Assistant": "assistant"}


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """Return the turns of a marked dialogue; a last turn that only cues the assistant is empty.

    Raises:
        ValueError: the text does not begin with a marker.
    """
    parts = _MARKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"no `Human:` or `Assistant:` at the beginning of {_start_of(text)}")
    return tuple(
        Turn(_ROLES[name], said.strip())
        for name, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def parse_prompt(text: str) -> History:
    """Return the history in `text`: a marked dialogue, or plain text as one human turn.

    Raises:
        ValueError: nothing is asked: the text or the last human turn is empty.
    """
    if not _MARKER.match(text):
        return checked_history((Turn("human", text.strip()),))
    turns = parse_dialogue(text)
    if turns[-1] == Turn("assistant", ""):
        turns = turns[:-1]
    return checked_history(turns)


def dialogue(history: History) -> str:
    """Return a history as a marked dialogue, up to where the assistant speaks."""
    turns = [f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in history]
    return "".join(turns) + "\n\nAssistant:"


def checked_history(turns: tuple[Turn, ...]) -> History:
    """Return `turns` if they can be answered.

    Raises:
        ValueError: they do not end with something said by the human.
    """
    if not turns or turns[-1].role != "human":
        raise ValueError("the prompt does not end with a human turn")
    if not turns[-1].text:
        raise ValueError("the prompt's last human turn is empty")
    return turns


def split_dialogue(turns: tuple[Turn, ...]) -> tuple[History, str]:
    """Return a dialogue's history and its last response.

    Raises:
        ValueError: it does not end with a response to something.
    """
    if turns[-1].role != "assistant":
        raise ValueError("the dialogue does not end with an assistant turn")
    return checked_history(turns[:-1]), turns[-1].text


def pair_from_dialogues(chosen: str, rejected: str) -> tuple[History, str, str]:
    """Return the history that two whole dialogues share, and how each goes on.

    The history is the longest common run of turns that ends with the human. What follows is one
    response, or, where a side goes on for several turns, all of them with their markers.

    Raises:
        ValueError: the dialogues share no history, do not differ, or are empty after it.
    """
    sides = parse_dialogue(chosen), parse_dialogue(rejected)
    shared = 0
    for number, (left, right) in enumerate(zip(*sides, strict=False), 1):
        if left != right:
            break
        if left.role == "human":
            shared = number
    if not shared:
        raise ValueError("the two dialogues share no human turn to begin with")
    history = checked_history(sides[0][:shared])
    good, bad = (_continuation(turns[shared:]) for turns in sides)
    if good == bad:
        raise ValueError("both responses are empty" if not good else "the responses are identical")
    return history, good, bad


def _continuation(turns: tuple[Turn, ...]) -> str:
    if not turns:
        return ""
    if turns[0].role != "assistant":
        raise ValueError("a human turn stands where the response should be")
    marked = [f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in turns[1:]]
    return turns[0].text + "".join(marked)


def _start_of(text: str) -> str:
    return repr(text[:40]) + ("..." if len(text) > 40 else "")


@dataclass(frozen=True)
class UnreadableLine:
    """Stands for a line that is not JSON."""

    reason: str


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", record) for every line that is not blank; lines count from 1.

    Args:
        path: a `.jsonl` file, or `.gz` of one.
        key: the config key that named the file, for errors.

    Raises:
        UserError: the file is missing, or broken as a whole.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"{key}: no such file: {path} (found {found}); give a .jsonl or .jsonl.gz")
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


_MARK = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def split_turns(prompt: str) -> list[tuple[str, str]]:
    """Return (role, text) of each turn; the role is empty for text that is no dialogue.

    The empty turn at the end, which asks the model to speak, is left out. Text that imitates the
    marks looks like turns here, as it does to the model.
    """
    parts = _MARK.split(prompt)
    before, marked = parts[0].strip(), parts[1:]
    turns = [("", before)] if before or not marked else []
    turns += [(role, text.strip()) for role, text in zip(marked[::2], marked[1::2], strict=True)]
    return [turn for number, turn in enumerate(turns) if turn[1] or number < len(turns) - 1]
