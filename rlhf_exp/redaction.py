"""Secrets kept out of whatever is shown or stored: messages, logs, tracebacks, records, reports.

Known secrets are the values of environment variables that hold keys, and the keys that clients were
given. They are hidden in the forms in which servers and libraries repeat them: plain, URL-encoded,
in base64, escaped for JSON, HTML or Python. Passwords and tokens in addresses and `Authorization`
headers are hidden whoever they belong to. `UserError` hides them in every message, `install` in
what Python prints or logs itself.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import sys
import threading
import traceback
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"

# The keys that this project and the libraries it calls take from the environment.
_variables = {
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
}
_values: set[str] = set()
# A shorter value is no secret: hiding it would garble every text.
_SHORTEST = 4
# A shorter value is hidden as a word of its own only.
_LONG = 8
# Each begins with a literal text, so that a long or hostile text takes time by its length only.
_CASES = (
    # The password or token before a host; a user's name alone is often a token, too.
    (re.compile(r"(?<=://)[^\s/?#\"'<>]+@"), f"{HIDDEN}@"),
    (
        re.compile(
            r"([?&;][\w.\-\[\]]*(?:key|token|secret|passwd|password|signature|sig|auth|credential)"
            r"s?=)[^\s&#;,)\"'<>]+",
            re.I,
        ),
        rf"\g<1>{HIDDEN}",
    ),
    (
        re.compile(
            r"(authorization(?:\\?[\"']\s*[:=,]|\s*[:=])\s*(?:b?\\?[\"'])?"
            r"(?:(?:bearer|basic|token)\s+)?)"
            r"(?!bearer\b|basic\b|token\b)[^\s\"'\\,;]+",
            re.I,
        ),
        rf"\g<1>{HIDDEN}",
    ),
    # With a digit: "bearer token" is no secret.
    (re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{8,}", re.I), rf"\g<1>{HIDDEN}"),
)


def note_secret(value: str | None) -> None:
    """Hide `value` from now on in all that this process shows or stores."""
    if value:
        _values.add(value)


def note_secret_variable(name: str) -> None:
    """Hide the value of an environment variable from now on."""
    _variables.add(name)


def secret_variable(name: str) -> str | None:
    """Return the value of an environment variable that holds a key, hidden from now on."""
    note_secret_variable(name)
    return os.environ.get(name)


def without_secrets(text: str) -> str:
    """Return `text` with known secrets, passwords in addresses and `Authorization` hidden."""
    pattern = _pattern(_known())
    if pattern is not None:
        text = pattern.sub(HIDDEN, text)
    for case, replacement in _CASES:
        text = case.sub(replacement, text)
    return text


def without_echoes(text: str, secret: str | None) -> str:
    """Return a server's message without secrets and without parts of the key that it was sent.

    A server may repeat the beginning or the end of a key, or be cut off inside it.
    """
    text = without_secrets(text)
    if not secret or len(secret) < _LONG:
        return text
    size = min(_LONG, len(secret) // 2)
    folded = secret.casefold()
    parts = {folded[start : start + size] for start in range(len(folded) - size + 1)}
    lower = text.casefold()
    if len(lower) != len(text):  # letters whose cases differ in length: compare as it stands
        lower = text
    shown = [True] * len(text)
    for start in range(len(text) - size + 1):
        if lower[start : start + size] in parts:
            shown[start : start + size] = [False] * size
    pieces = []
    for index, letter in enumerate(text):
        if shown[index]:
            pieces.append(letter)
        elif not index or shown[index - 1]:
            pieces.append(HIDDEN)
    return "".join(pieces)


def redacted(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value with the secrets in its texts hidden."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {redacted(name): redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value))
    return value


def install() -> None:
    """Hide secrets in uncaught exceptions, of threads too, and in all log records."""
    sys.excepthook = _print_exception
    threading.excepthook = _print_thread_exception
    logging.setLogRecordFactory(_LogRecord)


def formatted_exception(error: BaseException) -> str:
    """Return the traceback of an exception as text, with secrets hidden."""
    return without_secrets("".join(traceback.format_exception(error)))


class _LogRecord(logging.LogRecord):
    """A log record whose message and traceback hold no secret."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as `LogRecord`
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[1] is not None:
            # Formatters take this text as it is.
            self.exc_text = formatted_exception(self.exc_info[1]).rstrip("\n")

    def getMessage(self) -> str:
        """Return the message with its arguments."""
        return without_secrets(super().getMessage())


def _print_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(without_secrets(text))


def _print_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is None or issubclass(arguments.exc_type, SystemExit):
        return
    name = arguments.thread.name if arguments.thread is not None else "?"
    trace = formatted_exception(arguments.exc_value)
    sys.stderr.write(f"Exception in thread {without_secrets(name)}:\n{trace}")


def _known() -> frozenset[str]:
    variables = (os.environ.get(name, "") for name in _variables)
    return frozenset(value for value in (*_values, *variables) if len(value.strip()) >= _SHORTEST)


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Return a pattern of all forms of some secrets; `None` for no secret."""
    choices: set[str] = set()
    for secret in secrets:
        for form in _forms(secret.strip()):
            escaped = re.escape(form)
            choices.add(escaped if len(form) >= _LONG else rf"(?<!\w){escaped}(?!\w)")
    if not choices:
        return None
    # The longest first: a form may contain another one.
    return re.compile("|".join(sorted(choices, key=lambda text: (-len(text), text))), re.I)


def _forms(secret: str) -> set[str]:
    """Return the forms in which a text may be repeated."""
    forms = {
        secret,
        quote(secret, safe="", errors="replace"),
        quote(secret, errors="replace"),
        quote_plus(secret, errors="replace"),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        html.escape(secret),
        repr(secret)[1:-1],
    }
    content = secret.encode("utf-8", "surrogateescape")
    if len(content) < _LONG:
        return forms
    # Inside a longer text, such as `user:key`, its letters depend on where it begins.
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + content).decode()
        begin = (0, 2, 3)[offset]
        end = (0, 3, 2)[(offset + len(content)) % 3]
        inner = encoded[begin : len(encoded) - end]
        for form in (inner, inner.replace("+", "-").replace("/", "_")):
            forms |= {form, quote(form, safe="")}
    return forms
