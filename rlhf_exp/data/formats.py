"""One record of a file or data set to one row, whichever of the known formats it has."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_exp.data.hh import pair_from_dialogues, parse_dialogue, parse_prompt, split_dialogue
from rlhf_exp.data.rows import Demonstration, History, Preference, Prompt, Row

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
