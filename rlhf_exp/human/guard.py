"""Who may do what: tokens of links and forms, and the headers of every answer.

A page belongs to the link's token, which is in its address; there are no cookies. A form also
carries a token of its own, bound to annotator, item and the time at which the page was made: so a
vote cannot be sent for a page that was not served, and the time it took is the server's to say.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_exp.human.study import Annotator

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Back and forward must show what is stored, not what was.
    "Cache-Control": "no-store",
}


class Headers:
    """Middleware: puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, guarded)


def same(left: str, right: str) -> bool:
    """Compare two tokens in constant time."""
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


def find(annotators: Sequence[Annotator], token: str) -> Annotator | None:
    """Return whose link it is."""
    found = None
    for annotator in annotators:
        if same(annotator.token, token):
            found = annotator
    return found


def now_ms() -> int:
    """Return the server's time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def form_token(secret: str, annotator: str, item: str, shown_ms: int) -> str:
    """Return the token of a form made for an annotator and an item at a time."""
    content = json.dumps([annotator, item, shown_ms])
    return hmac.new(bytes.fromhex(secret), content.encode(), "sha256").hexdigest()
