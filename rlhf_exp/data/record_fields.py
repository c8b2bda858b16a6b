"""Values of a record's fields: texts, numbers, labels, lists, and turns in lists of messages.

A message has `role` and `content`, or ShareGPT's `from` and `value`. All errors are `ValueError`s
that name the field and what was found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from rlhf_exp.data.jsonl import parse_json, unpaired_surrogate
from rlhf_exp.data.parsing import BYTE_ORDER_MARK, names_a_turn
from rlhf_exp.data.rows import Role, Turn

Record = Mapping[str, object]

_SPEAKERS: dict[str, Role] = {
    "system": "system",
    "user": "human",
    "human": "human",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_TOOL_ROLES = frozenset(
    (
        *("tool", "function", "ipython", "observation", "environment"),
        *("function_call", "function_response", "tool_call", "tool_response", "tool_result"),
    )
)
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
_ROW_TOOLS = ("tools", "functions")
_NO_TOOLS = "dialogues with tools cannot be trained on; leave such rows out"
_MESSAGE, _SHAREGPT = frozenset(("role", "content")), frozenset(("from", "value"))
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{'(?:role|content|from|value)':")
_MAX_NAMES = 20
"""Most fields that a message lists."""


def text_in(record: Record, name: str) -> str:
    """Return the text of a field.

    Raises:
        ValueError: It is none.
    """
    value = record[name]
    # RealToxicityPrompts' prompts come with scores.
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise ValueError(f"`{name}` is {found}, text was expected")
    return _checked(value, f"`{name}`")


def _checked(text: str, where: str) -> str:
    if half := unpaired_surrogate(text):
        raise ValueError(f"{where} holds half of a character ({half}), which cannot be encoded")
    return text.lstrip(BYTE_ORDER_MARK)


def finite_number(value: object) -> float | None:
    """Return a finite number, which a CSV file has as text; `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def rating_in(record: Record, name: str) -> float:
    """Return the number in a field.

    Raises:
        ValueError: It is none, or not finite.
    """
    number = finite_number(record[name])
    if number is None:
        raise ValueError(f"`{name}` is {str(record[name])[:40]!r}, a number was expected")
    return number


def label_in(record: Record, name: str) -> float:
    """Return 1 for a field that says true, 0 for one that says false.

    Raises:
        ValueError: It says neither.
    """
    value = record[name]
    known = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    label = known.get(str(value).strip().lower())
    if label is None:
        raise ValueError(f"`{name}` is {str(value)[:40]!r}, true or false was expected")
    return label


def list_in(record: Record, name: str) -> list[object]:
    """Return the list in a field, which may be JSON text, as in a CSV file."""
    value = record[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"`{name}` is text, and no list in JSON: {error}") from error
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` is {type(value).__name__}, a list was expected")
    if not value:
        raise ValueError(f"`{name}` is an empty list")
    return list(value)


def holds_messages(record: Record, name: str) -> bool:
    """Return whether a field is a list of messages, which a CSV file has as JSON text.

    Raises:
        ValueError: It is one as Python writes it, and no JSON.
    """
    value = record[name]
    if not isinstance(value, str) or not _LIST_OF_OBJECTS.match(value):
        return isinstance(value, list | tuple)
    if _PYTHON_MESSAGES.match(value):
        raise ValueError(
            f"`{name}` is a list of messages as Python writes it; write it as JSON (json.dumps)"
        )
    try:
        items = parse_json(value)
    except ValueError:
        return False
    assert isinstance(items, list), "it begins with a bracket"
    return all(
        isinstance(item, Mapping) and (item.keys() >= _MESSAGE or item.keys() >= _SHAREGPT)
        for item in items
    )


def turns_in(record: Record, name: str) -> tuple[Turn, ...]:
    """Return the turns in a list of messages.

    Raises:
        ValueError: It is none, speaks of tools, or has a system turn that is not the first.
    """
    for tools in _ROW_TOOLS:
        if record.get(tools) not in (None, "", [], "[]", {}):
            raise ValueError(f"the row has `{tools}`; {_NO_TOOLS}")
    turns = [
        _turn(message, f"`{name}`, message {number}")
        for number, message in enumerate(list_in(record, name), 1)
    ]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError(f"`{name}` has a system turn that is not its first message")
    return tuple(turns)


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {type(message).__name__}, `role` and `content` were expected")
    names = (
        ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    )
    missing = [name for name in names if name not in message]
    if missing:
        raise ValueError(f"{where} has no `{missing[0]}`; fields found: {listed(message)}")
    role = str(message[names[0]]).strip().lower()
    if role in _TOOL_ROLES:
        raise ValueError(f"{where} has the role `{role}`; {_NO_TOOLS}")
    if role not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise ValueError(f"{where} has the role `{role[:40]}`; known roles: {known}")
    for tool in _TOOL_FIELDS:
        if message.get(tool):
            raise ValueError(f"{where} has `{tool}`; {_NO_TOOLS}")
    text = _checked(_content(message[names[1]], where), where).strip()
    if names_a_turn(text):
        raise ValueError(f"{where} has a line that begins as a turn does (`Human:`)")
    return Turn(_SPEAKERS[role], text)


def _content(content: object, where: str) -> str:
    """Return the text of a message; parts of text are joined as chat templates write them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where} has {type(content).__name__} as content, text was expected")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "str") or not isinstance(text, str):
            raise ValueError(f"{where} has a part of the type `{kind}`; only text can be read")
        texts.append(text)
    return "".join(texts)


def listed(names: Iterable[object]) -> str:
    """Return names of fields for a message, the first of many."""
    shown = [str(name)[:40] for name in names]
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    return (", ".join(shown[:_MAX_NAMES]) or "none") + more
