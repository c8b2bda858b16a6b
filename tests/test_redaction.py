"""Secrets are hidden, whoever repeats them and in whatever form."""

from __future__ import annotations

import base64
import html
import json
import logging
import sys
import threading
import time
from urllib.parse import quote, quote_plus

import pytest

from rlhf_exp import redaction
from rlhf_exp.errors import UserError
from rlhf_exp.processes.failures import ProcessFailure
from rlhf_exp.redaction import note_secret, redacted, secret_variable, without_echoes

KEY = 'rk/SECRET+77="ü'
NUMBERED = "sk-proj-0123456789abcdef"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_values", set())
    monkeypatch.setattr(redaction, "_variables", set(redaction._variables))
    note_secret(KEY)
    note_secret(NUMBERED)


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"bad header Bearer {KEY}!",
        f"a {KEY.upper()} b",
        f"url ?x={quote(KEY, safe='')}&y",
        f"url {quote(KEY)}",
        f"form {quote_plus(KEY)}",
        json.dumps({"key": KEY}),
        json.dumps({"key": KEY}, ensure_ascii=False),
        html.escape(f"<b>{KEY}</b>"),
        repr(KEY),
        *(f"basic {base64_of(user + KEY + after)}" for user in ("", "a:", "ab:") for after in "xy"),
        base64.urlsafe_b64encode(f"api:{KEY}".encode()).decode(),
        quote(base64_of(KEY), safe=""),
    ],
)
def test_every_form_of_a_known_key(text: str) -> None:
    found = redaction.without_secrets(text)
    assert "***" in found
    for part in ("SECRET", "secret", base64_of(KEY)[4:12], base64_of("a:" + KEY)[6:12]):
        assert part not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://me:pa@ss@host/x?y=1", "at https://***@host/x?y=1"),
        ("at https://ghp_123@github.com/a", "at https://***@github.com/a"),
        ("http://h/p?api_key=abc123&n=1 and", "http://h/p?api_key=***&n=1 and"),
        ("http://h/p?n=1&access_token=abc", "http://h/p?n=1&access_token=***"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic YTpi'}", "{'authorization': 'Basic ***'}"),
        ('{\\"Authorization\\": \\"abc\\"}', '{\\"Authorization\\": \\"***\\"}'),
        ("got bearer x1234567890, why", "got bearer ***, why"),
        ("send the key as a bearer token", "send the key as a bearer token"),
        ("write to me@host, see ppo.reward.key_env=MINE", None),
        ("monkey=1, tokens=5, a key: value, basic authentication", None),
    ],
)
def test_passwords_and_tokens_in_general(text: str, expected: str | None) -> None:
    assert redaction.without_secrets(text) == (text if expected is None else expected)


def test_values_of_variables_are_read_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("KEY_READ_LATE", "key-that-is-read-late")
    assert str(UserError("a " + "0123456789" * 4)) == "a ***"
    assert redaction.without_secrets("key-that-is-read-late") == "key-that-is-read-late"
    assert secret_variable("KEY_READ_LATE") == "key-that-is-read-late"
    assert redaction.without_secrets("key-that-is-read-late") == "***"


def test_a_short_key_is_hidden_as_a_word_and_a_tiny_one_is_none() -> None:
    note_secret("abcd")
    note_secret("a")
    assert redaction.without_secrets("a abcd, abcde, xabcd") == "a ***, abcde, xabcd"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("wrong key sk-proj-0123456", "wrong key ***"),
        ("ends in 89abcdef.", "ends in ***."),
        ("got SK-PROJ-01234567…", "got ***…"),
        ("it begins with sk-pro", "it begins with sk-pro"),
        ("İ sk-proj-0123", "İ ***"),
    ],
)
def test_parts_of_the_key_in_a_servers_message(text: str, hidden: str) -> None:
    assert without_echoes(text, NUMBERED) == hidden


def test_all_texts_of_a_value() -> None:
    value = {"a": [f"x {NUMBERED}", 1, None], f"k {NUMBERED}": (1.5, {"b": NUMBERED})}
    assert redacted(value) == {"a": ["x ***", 1, None], "k ***": (1.5, {"b": "***"})}


def test_messages_of_user_errors_and_failures_of_processes() -> None:
    assert str(UserError(f"at {NUMBERED}: no")) == "at ***: no"
    failure = ProcessFailure.of(0, RuntimeError(NUMBERED))
    assert NUMBERED not in failure.text
    assert "RuntimeError: ***" in failure.text


def test_what_python_prints_and_logs_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = logging.getLogRecordFactory()
    logger = logging.Logger("of this test")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    try:
        redaction.install()
        try:
            raise ValueError(f"in {NUMBERED}")
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
            logger.exception("logged %s", NUMBERED)

        def fail() -> None:
            raise ValueError(f"thread {NUMBERED}")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    finally:
        logging.setLogRecordFactory(before)
    printed = capsys.readouterr().err
    assert NUMBERED not in printed
    assert printed.count("ValueError: in ***") == 2
    assert "logged ***" in printed
    assert "ValueError: thread ***" in printed


@pytest.mark.parametrize(
    "text",
    [
        "y" * 10**5,
        "a:" * 10**5,
        "://" * 10**5,
        "://" + "a" * 10**5,
        "&key" * 10**5,
        "?" + "token" * 10**5,
        "authorization " * 10**5,
        "authorization: " + " " * 10**5,
        "bearer " * 10**5,
        "bearer" + " " * 10**5,
        NUMBERED[:-1] * 10**4,
    ],
)
def test_a_long_text_takes_time_by_its_length_only(text: str) -> None:
    began = time.process_time()
    redaction.without_secrets(text)
    assert time.process_time() - began < 1
