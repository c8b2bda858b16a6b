"""The client against servers that are broken or hostile, byte by byte."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.llm import Endpoint, JudgeClient, LLMJudge, ReplyCache
from rlhf_exp.evaluation.judges.protocol import AnswerPair
from rlhf_exp.http_client import HttpClient, Service
from rlhf_exp.training.scorers import RewardClient

Talk = Callable[[socket.socket, bytes], object]
KEY = "sk-of-this-test-0123"


@contextmanager
def server(talk: Talk) -> Iterator[str]:
    """Yield the address of a server that calls `talk` with each connection and its request."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        try:
            with connection:
                talk(connection, request_on(connection))
        except OSError:
            pass  # the client has gone

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


def request_on(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    length = int(lines[0].partition(b":")[2]) if lines else 0
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def says(body: bytes, *headers: str, status: str = "200 OK") -> Talk:
    return lambda connection, _: connection.sendall(reply(body, *headers, status=status))


def post(talk: Talk, body: dict[str, Any] | None = None, **settings: Any) -> Any:
    with server(talk) as url:
        service = Service(url, **({"timeout_s": 5.0, "retries": 0} | settings))
        client = HttpClient(service, lambda reason: UserError(f"{url}: {reason}"))
        try:
            return client.post("/", body or {}, lambda answer: answer)
        finally:
            client.close()


def refusal(talk: Talk, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        post(talk, **settings)
    return str(caught.value)


@pytest.mark.parametrize("whole", [b"HTTP/1.1 200 OK\r\nX-Never-Ends: ", reply(b" " * 10**6)])
def test_an_answer_that_trickles_has_one_deadline(whole: bytes) -> None:
    """In its headers as well as in its body, where every byte would start a timeout anew."""

    def trickle(connection: socket.socket, _: bytes) -> None:
        connection.sendall(whole[:100])
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    began = time.monotonic()
    assert "no answer within 0.3 s" in refusal(trickle, timeout_s=0.3)
    assert time.monotonic() - began < 3


def bomb(pack: Callable[[bytes], bytes]) -> bytes:
    return pack(bytes(50_000_000))


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (bomb(gzip.compress), ["Content-Encoding: gzip"], "an answer of more than 16 MB"),
        (bomb(zlib.compress), ["Content-Encoding: deflate"], "an answer of more than 16 MB"),
        (b"[" * 17_000_000, [], "an answer of more than 16 MB"),
        (b"xyz", ["Content-Encoding: br"], "an answer packed by br, unasked"),
        (gzip.compress(b"{}", mtime=0)[:-12], ["Content-Encoding: gzip"], "no connection ("),
        (b"{}", ["Content-Encoding: gzip"], "no connection ("),
        (b"[" * 100_000, [], "its brackets are too deep ('[[[["),
        (b'{"a":' * 70 + b"1" + b"}" * 70, [], "its brackets are too deep"),
        (b"9" * 5000, [], "no JSON in the answer ('999"),
        (b"\xff\xfe\x00\xd8", [], "no JSON in the answer"),
        (b"", [], "no JSON in the answer ('')"),
        (b"<html>\x1b[2Jhello", ["Content-Type: text/html; charset=rot13"], "<html>"),
    ],
)
def test_an_answer_that_cannot_be_used(body: bytes, headers: list[str], expected: str) -> None:
    found = refusal(says(body, *headers))
    assert expected in found
    assert "\x1b" not in found


def test_a_packed_answer_is_unpacked() -> None:
    assert post(says(gzip.compress(b'{"a": 1}'), "Content-Encoding: gzip")) == {"a": 1}
    assert post(says(zlib.compress(b'{"a": 1}'), "Content-Encoding: deflate")) == {"a": 1}


def test_a_connection_closed_inside_the_answer_is_tried_again() -> None:
    answers = [reply(b'{"a": 1}')[:-3], reply(b'{"a": 2}')]
    assert post(lambda c, _: c.sendall(answers.pop(0)), retries=1) == {"a": 2}
    assert "no connection (" in refusal(lambda connection, _: connection.close())
    assert "no connection (" in refusal(lambda connection, _: connection.sendall(b"\0\1 hello\r\n"))


def test_a_redirect_is_named_and_not_followed() -> None:
    target = "Location: http://elsewhere/?token=abc"
    found = refusal(says(b"", target, status="307 Temporary Redirect"), key=KEY)
    assert "HTTP 307" in found
    assert "it points to http://elsewhere/?token=***; if that is right, give it as the" in found


def test_texts_of_an_answer_can_be_kept_and_sent_on() -> None:
    raw = b'{"half \\ud83d": ["\\ud83d\\ude00", "Bearer ' + KEY.encode() + b'", 1e999]}'
    value = post(says(raw), key=KEY)
    assert value == {"half \ufffd": ["\U0001f600", "Bearer ***", float("inf")]}


def test_texts_of_a_request_are_well_formed() -> None:
    sent: list[bytes] = []

    def keep(connection: socket.socket, request: bytes) -> None:
        sent.append(request)
        connection.sendall(reply(b"{}"))

    post(keep, {"text": "half \ud83d, whole \U0001f600"})
    assert json.loads(sent[0].partition(b"\r\n\r\n")[2]) == {
        "text": "half \ufffd, whole \U0001f600"
    }


@pytest.mark.parametrize(
    "answer",
    [
        reply(f"you sent Bearer {KEY}".encode()),
        reply(f"no such key: {KEY[:12]}".encode(), status="401 Unauthorized"),
        reply(b"x" * 290 + KEY.encode(), status="400 Bad Request"),
        reply(b"", status=f"400 {KEY}"),
        f"HTTP/1.1 {KEY}\r\n\r\n".encode(),
        reply(json.dumps({"error": {"authorization": f"Bearer {KEY}"}}).encode(), status="422 No"),
    ],
)
def test_the_key_is_in_no_message(answer: bytes) -> None:
    found = refusal(lambda connection, _: connection.sendall(answer), key=KEY)
    assert KEY[:8] not in found
    assert KEY[-8:] not in found


@pytest.mark.parametrize("key", ["sk-abc\n", " sk-abc", "sk-a\u00fc", "sk\x00abc"])
def test_a_key_that_no_header_can_hold_is_not_shown(key: str) -> None:
    with pytest.raises(UserError, match="its key cannot be sent") as caught:
        HttpClient(Service("http://127.0.0.1:1", key), UserError)
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize("url", ["http://" + "a" * 300, "http://[::1", "http://a b", "nothing"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match=r"no usable address|no connection"):
        HttpClient(Service(url, retries=0), UserError).post("", {}, lambda answer: answer)


def test_a_service_that_is_there_need_not_admit_us() -> None:
    with server(says(b"", status="403 Forbidden")) as url:
        client = HttpClient(Service(url, timeout_s=5.0), UserError)
        client.check_reachable("/models", admits=False)
        with pytest.raises(UserError, match="HTTP 403 Forbidden"):
            client.check_reachable("/models")
        client.close()


def test_another_thread_can_stop_a_request() -> None:
    reached = threading.Event()

    def never(connection: socket.socket, _: bytes) -> None:
        reached.set()
        time.sleep(5)

    with server(never) as url:
        client = HttpClient(Service(url, timeout_s=60.0), UserError)

        def stop() -> None:
            reached.wait(5)
            client.stop()

        threading.Thread(target=stop).start()
        began = time.monotonic()
        with pytest.raises(UserError, match="given up, because another request failed"):
            client.post("", {}, lambda answer: answer)
        assert time.monotonic() - began < 4


COMPLETIONS = [
    b'{"choices":[{"message":{"content":"I think \\ud83d"}}],"usage":{"prompt_tokens":1}}',
    b'{"choices":[{"message":{"content":"Verdict: 1"}}],"usage":{"prompt_tokens":Infinity}}',
    b'{"choices":[{"message":{"content":"Verdict: 1"}}],"usage":{"prompt_tokens":NaN}}',
    b'{"choices":[{"message":{"content":"Verdict: 1"}}],"usage":{"prompt_tokens":1' + b"0" * 400,
    b'{"choices":[{"message":{"content":["\\ud83d", 1]}}],"usage":[]}',
    b'{"choices":{"0":1}}',
    b'{"choices":' + b"[" * 50_000,
    b'{"choices":[{"message":{"content":"' + KEY.encode() + b'"}}]}',
]


@pytest.mark.parametrize("body", COMPLETIONS)
def test_a_judges_reply_is_a_verdict_or_an_error_in_each_try(body: bytes, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    with server(says(body)) as url:
        for _ in range(2):
            client = JudgeClient(Endpoint(url, "m", KEY, 5.0, 0))
            judge = LLMJudge(client, ReplyCache(file), concurrency=1)
            with suppress(UserError):
                assert len(judge.verdicts([AnswerPair("p", "a", "b")])) == 1
            assert judge.usage.prompt_tokens in (0, 2, 4)
    assert not file.exists() or KEY not in file.read_text()


def test_replies_that_an_earlier_version_kept_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    body = {"model": "m"}
    digest = http_client_digest(body)
    counts = '"completion_tokens": 1, "prompt_tokens": '
    lines = [
        f'{{"request": "{digest}", "content": "half \\ud83d", {counts}Infinity}}',
        "[" * 100_000,
        '{"request": "x", "content": 7, ' + counts + "1}",
    ]
    file.write_text("\n".join(lines))
    reply = ReplyCache(file).get(body)
    assert reply is not None
    assert (reply.content, reply.prompt_tokens) == ("half \ufffd", 0)


def http_client_digest(body: dict[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    "score", ["NaN", "-Infinity", "1" + "0" * 400, "1e39", '"\\ud83d"', "null"]
)
def test_a_reward_that_is_no_number(score: str) -> None:
    with server(says(f'{{"scores": [{score}]}}'.encode())) as url:
        client = RewardClient(Service(url, timeout_s=5.0, retries=0))
        with pytest.raises(UserError, match="for the response 'r'; expected a finite number"):
            client.scores(["p"], ["r"])
