"""An OpenAI-compatible endpoint on loopback that answers by a rule."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

# What a rule returns: the reply's text; or a status, headers and a body.
Answer = str | tuple[int, dict[str, str], str]
Rule = Callable[[dict[str, Any]], Answer]
_SHOWN = re.compile(r"<<<ANSWER (\d) (\w+)>>>\n(.*?)\n<<<END \2>>>", re.DOTALL)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers in the order in which a request shows them."""
    texts = {number: text for number, _, text in _SHOWN.findall(body["messages"][1]["content"])}
    return texts["1"], texts["2"]


def longer(body: dict[str, Any]) -> str:
    """Prefer the longer answer."""
    first, second = (len(text) for text in shown(body))
    choice = "tie" if first == second else "1" if first > second else "2"
    return f"It is longer.\n\nVerdict: {choice}"


class JudgeServer:
    """Context manager; keeps what it was asked.

    Attributes:
        bodies: the requests' JSON.
        headers: their headers.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        """The API's base."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def in_turn(*answers: Answer | Rule) -> Rule:
    """Return a rule that gives each answer once, and then the last one forever."""
    left: list[Answer | Rule] = list(answers)
    lock = threading.Lock()

    def rule(body: dict[str, Any]) -> Answer:
        with lock:
            one = left.pop(0) if len(left) > 1 else left[0]
        return one(body) if callable(one) else one

    return rule


def completion(text: str) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})


def _handler(owner: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            owner.bodies.append(body)
            owner.headers.append({k.lower(): v for k, v in self.headers.items()})
            owner.paths.append(self.path)
            answer = owner.rule(body)
            found = (200, {}, completion(answer)) if isinstance(answer, str) else answer
            status, headers, text = found
            data = text.encode()
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has gone

        def log_message(self, *_: object) -> None:
            pass

    return Handler
