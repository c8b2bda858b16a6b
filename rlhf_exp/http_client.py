"""An HTTP client for JSON services, such as LLM judges and reward servers, that retries requests.

Failed requests are repeated after growing waits with jitter, or after the time that the server asks
for. A server is not trusted: a request has one deadline, however slowly its answer trickles; an
answer has a size and a depth limit; the texts in it are made well-formed, and hold no key.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from rlhf_exp.errors import UserError
from rlhf_exp.redaction import note_secret, without_echoes, without_secrets
from rlhf_exp.safe_text import clipped, visible, well_formed

T = TypeVar("T")
MAX_ANSWER_BYTES = 16_000_000
"""Most bytes of an answer, unpacked; a thousand scores are some twenty thousand."""
MAX_DEPTH = 64
_TOO_LONG = f"an answer of more than {MAX_ANSWER_BYTES / 1e6:g} MB"
# Timeouts, conflicts, too many requests; everything from 500 on besides.
_RETRIED_STATUSES = (408, 409, 425, 429)
_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRY_AFTER_S = 1.0, 60.0, 600.0
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_PACKED = ("gzip", "x-gzip", "deflate")
# Of an error's body, before it is cut to what is shown.
_MAX_MESSAGE = 20_000


@dataclass(frozen=True)
class Service:
    """A service's address, and the timeout and retries of requests to it.

    Attributes:
        url: an address, such as `http://127.0.0.1:8000/v1`.
        key: API key, sent as a bearer token; never shown, stored or logged.
        timeout_s: seconds until a request counts as failed, its answer included.
        retries: most repetitions of a failed request.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    retries: int = 8


@dataclass(frozen=True)
class RequestFailed:
    """A request that may succeed later.

    Attributes:
        reason: of the failure, for a message.
        after_s: wait that the server asks for, in seconds.
    """

    reason: str
    after_s: float | None = None


@dataclass(frozen=True)
class _Answer:
    """A server's answer.

    Attributes:
        status: its status.
        phrase: the status in words.
        headers: its headers.
        body: its body, unpacked.
    """

    status: int
    phrase: str
    headers: httpx2.Headers
    body: bytes


class _UnusableAnswer(Exception):
    """An answer that a further request would get again; the message says why it is unusable."""


class HttpClient:
    """Sends requests; safe to share between threads.

    Attributes:
        retried: attempts that failed and were repeated.

    Args:
        service: address, timeout and retries.
        error: returns the exception for a reason.
        wait: waits for a number of seconds; `None`: `stop` ends a wait.
        draw: returns a uniform number in [0, 1), for the jitter of waits.

    Raises:
        UserError: the address is none, or the key cannot be sent in a header.
    """

    def __init__(
        self,
        service: Service,
        error: Callable[[str], UserError],
        wait: Callable[[float], object] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        note_secret(service.key)
        self.service, self._error = service, error
        self.retried = 0
        self._stopped = threading.Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._draw = draw
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way: set[Future[_Answer]] = set()
        key = service.key
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise error(
                "its key cannot be sent: it begins or ends with white space, or holds a line end "
                "or a character beyond ASCII; set the environment variable to the key alone"
            )
        headers = {"Accept-Encoding": ", ".join(_PACKED[::2])}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            host = urlsplit(service.url).hostname
        except ValueError as reason:
            raise error(f"no usable address ({reason})") from reason
        # A proxy in the environment is not for requests to this machine.
        use_proxy = host not in _LOCAL_HOSTS
        self._http = httpx2.AsyncClient(
            timeout=service.timeout_s, headers=headers, trust_env=use_proxy
        )

    def close(self) -> None:
        """Close the connections."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def stop(self) -> None:
        """Make requests give up that are under way, or wait to be repeated."""
        self._stopped.set()
        with self._lock:
            under_way = list(self._under_way)
        for request in under_way:
            request.cancel()

    def check_reachable(self, path: str, *, admits: bool = True) -> None:
        """Check with one GET that the service answers.

        Args:
            path: below the service's address.
            admits: whether it must also admit us: any status but 401 and 403 will do.

        Raises:
            UserError: there is no answer, or the key is refused or missing.
        """
        try:
            answer = self._exchange("GET", path, None)
        except _UnusableAnswer:  # an answer all the same
            return
        if isinstance(answer, RequestFailed):
            raise self._error(answer.reason)
        if admits and answer.status in (401, 403):
            raise self._error(self._reason(answer))

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Any], T | RequestFailed],
        retries: int | None = None,
    ) -> T:
        """Send a request until it succeeds and return the result of `read`.

        Args:
            path: below the service's address.
            body: sent as JSON.
            read: reads the JSON of an answer of status 200; if it returns a `RequestFailed`, the
                request is repeated.
            retries: instead of the service's.

        Raises:
            UserError: the request is refused, or all its repetitions fail.
        """
        max_retries = self.service.retries if retries is None else retries
        attempt = 0
        while isinstance(result := self._once(path, body, read), RequestFailed):
            if attempt == max_retries or self._stopped.is_set():
                times = f", {attempt + 1} times in a row" if attempt else ""
                raise self._error(result.reason + times)
            with self._lock:
                self.retried += 1
            self._wait(self._pause(attempt, result.after_s))
            attempt += 1
        return result

    def _once(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Any], T | RequestFailed],
    ) -> T | RequestFailed:
        # Halves of surrogate pairs in the texts have no UTF-8.
        content = well_formed(json.dumps(dict(body), ensure_ascii=False, allow_nan=False)).encode()
        try:
            answer = self._exchange("POST", path, content)
        except _UnusableAnswer as error:
            raise self._error(str(error)) from error
        if isinstance(answer, RequestFailed):
            return answer
        if answer.status == 200:
            value = self._json(answer.body)
            return value if isinstance(value, RequestFailed) else read(value)
        reason = self._reason(answer)
        final = b"insufficient_quota" in answer.body  # a 429 that waiting does not help
        if (answer.status in _RETRIED_STATUSES or answer.status >= 500) and not final:
            return RequestFailed(reason, _retry_after(answer.headers.get("retry-after")))
        raise self._error(reason)

    def _exchange(self, method: str, path: str, content: bytes | None) -> _Answer | RequestFailed:
        """Send one request and return its answer.

        Raises:
            UserError: the address cannot be used, or `stop` was called.
            _UnusableAnswer: the answer cannot be used, and a further one would be like it.
        """
        url = self.service.url.rstrip("/") + path
        request = self._started(self._send(method, url, content))
        try:
            return request.result()
        except CancelledError as error:
            raise self._error("given up, because another request failed") from error
        except (TimeoutError, httpx2.TimeoutException):
            return RequestFailed(f"no answer within {self.service.timeout_s:g} s")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise self._error(f"no usable address ({error})") from error
        except (httpx2.RequestError, zlib.error) as error:
            reason = visible(clipped(str(error), 300)) or type(error).__name__
            return RequestFailed(f"no connection ({self._safe(reason)})")
        finally:
            request.cancel()
            with self._lock:
                self._under_way.discard(request)

    def _started(self, request: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
        """Start a request in the client's own thread, where it can be cut off at any moment."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run, args=(self._loop,), name="requests", daemon=True
                ).start()
            future = asyncio.run_coroutine_threadsafe(request, self._loop)
            self._under_way.add(future)
        return future

    async def _send(self, method: str, url: str, content: bytes | None) -> _Answer:
        # A deadline for all of it: the timeouts of the library start anew with each byte.
        headers = {} if content is None else {"Content-Type": "application/json"}
        async with (
            asyncio.timeout(self.service.timeout_s),
            self._http.stream(method, url, content=content, headers=headers) as response,
        ):
            raw = bytearray()
            async for chunk in response.aiter_raw():
                raw += chunk
                if len(raw) > MAX_ANSWER_BYTES:
                    raise _UnusableAnswer(_TOO_LONG)
            body = _unpacked(bytes(raw), response.headers.get("content-encoding", ""))
            return _Answer(response.status_code, response.reason_phrase, response.headers, body)

    def _json(self, body: bytes) -> Any:  # noqa: ANN401 - any JSON value, or a `RequestFailed`
        """Return the value in a body, its texts made safe to keep and to send."""
        try:
            return _safe_value(json.loads(body))
        except (ValueError, RecursionError) as error:
            # A proxy's page, or one that was cut off.
            deep = isinstance(error, RecursionError)
            why = "its brackets are too deep" if deep else "no JSON in the answer"
            start = self._safe(body[:_MAX_MESSAGE].decode("utf-8", "replace"))
            return RequestFailed(f"{why} ({' '.join(visible(start[:80]).split())!r})")

    def _pause(self, attempt: int, retry_after_s: float | None) -> float:
        """Return the seconds to wait: as the server asks, or twice as long each time."""
        if retry_after_s is not None:
            # Jitter of up to a tenth, so that requests do not all come back at once.
            return min(retry_after_s, _MAX_RETRY_AFTER_S) * (1 + 0.1 * self._draw())
        max_wait_s = min(_FIRST_WAIT_S * 2.0**attempt, _MAX_WAIT_S)
        return max_wait_s * (0.5 + 0.5 * self._draw())

    def _reason(self, answer: _Answer) -> str:
        text = self._safe(answer.body[:_MAX_MESSAGE].decode("utf-8", "replace").strip())
        message = " ".join(visible(clipped(text, 300)).split())
        phrase = visible(self._safe(answer.phrase))
        target = answer.headers.get("location")
        if 300 <= answer.status < 400 and target:
            elsewhere = visible(clipped(self._safe(target), 300))
            message = f"it points to {elsewhere}; if that is right, give it as the address"
        return f"HTTP {answer.status} {phrase}: {message or 'no message'}"

    def _safe(self, text: str) -> str:
        """Return a server's text without what it repeats of the key."""
        return without_echoes(text, self.service.key)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _unpacked(raw: bytes, encoding: str) -> bytes:
    """Return the content of a body that may be packed.

    Raises:
        _UnusableAnswer: its packing is unknown, or it holds too much.
        zlib.error: it is damaged or cut off.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not raw:
        return raw
    if encoding not in _PACKED:
        raise _UnusableAnswer(f"an answer packed by {visible(encoding[:40])}, unasked")
    reader = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # gzip or zlib, as its head says
    body = reader.decompress(raw, MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise _UnusableAnswer(_TOO_LONG)
    if not reader.eof:
        raise zlib.error("a packed answer was cut off")
    return body


def _safe_value(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value whose texts are well-formed and hold no secret.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise RecursionError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return without_secrets(well_formed(value))
    if isinstance(value, list):
        return [_safe_value(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_safe_value(k, depth + 1): _safe_value(v, depth + 1) for k, v in value.items()}
    return value


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.fromtimestamp(time.time(), UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
