"""Answers of servers of any content: a result as the protocol says, or an error in words."""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis, of the dev extra")

from hypothesis import given
from hypothesis import strategies as st

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.llm import (
    Endpoint,
    JudgeClient,
    read_verdict,
    reasons_in,
)
from rlhf_exp.http_client import Service
from rlhf_exp.training.scorers import RewardClient
from tests.fuzz.lab import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SECRET = "sk-of-this-fuzzing-4711"


class AnyServer:
    """Answers each request with the bytes that it was last given, and closes."""

    def __init__(self) -> None:
        self.answer = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._read_request(connection)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(1)
                    while connection.recv(65536):
                        pass
                except OSError:
                    continue

    def _read_request(self, connection: socket.socket) -> None:
        connection.settimeout(1)
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                left = int(line.partition(b":")[2]) - len(body)
                while left > 0:
                    left -= len(connection.recv(65536))

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def server() -> Iterator[AnyServer]:
    running = AnyServer()
    yield running
    running.close()


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["A", "[[A]]", "[[B]]", "[[C]]", '{"verdict": "A"}', "\ud83d", "\x1b[2J", SECRET]
    ),
)
NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([10**400, -1, 2**63, 1e39, float("nan")])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def fields(**known: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """An object with the protocol's fields, of which some may be missing or anything."""
    return st.fixed_dictionaries(
        {}, optional={name: st.one_of(value, value, VALUES) for name, value in known.items()}
    )


SCORES = fields(
    scores=st.lists(NUMBERS, max_size=3), name=TEXTS, tokenizer=TEXTS, error=TEXTS, detail=TEXTS
)
CHATS = fields(
    choices=st.lists(fields(message=fields(content=TEXTS, role=TEXTS)), max_size=2),
    usage=fields(prompt_tokens=NUMBERS, completion_tokens=NUMBERS),
    error=fields(message=TEXTS),
)


@st.composite
def answers(draw: st.DrawFn, content: st.SearchStrategy[object]) -> bytes:
    """The bytes of an answer: mostly HTTP, mostly JSON, somewhere damaged."""
    value = draw(st.one_of(content, content, VALUES))
    try:
        body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer too long to be written
        body = b"9" * 5000
    damage = draw(st.sampled_from(["none"] * 7 + ["cut", "bytes", "deep", "raw", "huge length"]))
    if damage == "cut":
        body = body[: draw(st.integers(0, len(body)))]
    elif damage == "bytes":
        body = draw(st.binary(max_size=30))
    elif damage == "deep":
        body = draw(st.sampled_from([b"[", b'{"scores":'])) * draw(st.sampled_from([70, 5000]))
    elif damage == "raw":
        return draw(st.binary(max_size=60))
    headers = [b"Connection: close"]
    if draw(st.integers(0, 9)) == 0:
        body = gzip.compress(body)[: draw(st.sampled_from([None, -4]))]
        headers.append(b"Content-Encoding: gzip")
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from([b"Retry-After", b"Content-Type", b"Location", b"X"]))
        value_of_header = draw(
            st.sampled_from([b"-1", b"1e9", b"\xff", b"text/html; charset=x", b""])
        )
        headers.append(name + b": " + value_of_header)
    length = b"999999999999" if damage == "huge length" else str(len(body)).encode()
    headers.append(b"Content-Length: " + length)
    status = draw(
        st.sampled_from(
            [b"200 OK"] * 8 + [b"204 X", b"301 X", b"400 X", b"401 X", b"429 X", b"500 X", b"99 X"]
        )
    )
    return b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body


@fuzz(1500)
@given(answer=answers(SCORES))
def test_any_answer_of_a_reward_server(server: AnyServer, answer: bytes) -> None:
    server.answer = answer
    service = Service(server.url, SECRET, timeout_s=0.5, retries=1)
    client = RewardClient(service, wait=lambda _: None, draw=lambda: 0.0)
    try:
        scores = client.scores(["p", "q"], ["r", "s"])
    except UserError as error:
        words = str(error)
    else:
        words = "scores"
        assert len(scores) == 2
        assert all(isinstance(score, float) and math.isfinite(score) for score in scores)
    finally:
        client._requests.close()
    assert "\x1b" not in words
    assert SECRET not in words
    words.encode()


@fuzz(1500)
@given(answer=answers(CHATS))
def test_any_answer_of_a_language_model(server: AnyServer, answer: bytes) -> None:
    server.answer = answer
    endpoint = Endpoint(server.url, "m", SECRET, timeout_s=0.5, retries=1)
    with JudgeClient(endpoint, wait=lambda _: None, draw=lambda: 0.0) as client:
        try:
            reply = client.ask(endpoint.body([]))
        except UserError as error:
            assert SECRET not in str(error)  # noqa: PT017 - a refusal in words is one of two right ends
            str(error).encode()
            return
    assert read_verdict(reply.content) in {None, -1, 0, 1}
    reply.content.encode()
    assert 0 <= reply.prompt_tokens < 2**53


@fuzz(1500)
@given(
    parts=st.lists(
        st.one_of(TEXTS, st.sampled_from(["verdict", ":", "{", "}", "[[", "]]", "\n", "tie"])),
        max_size=12,
    )
)
def test_any_reply_of_a_judge(parts: list[str]) -> None:
    reply = "".join(parts)
    assert read_verdict(reply) in {None, -1, 0, 1}
    reasons_in(reply)
