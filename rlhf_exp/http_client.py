"""One POST of JSON, tried until it succeeds; what judges and reward servers are asked by."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from rlhf_exp.errors import UserError
from rlhf_exp.safe_text import clipped, visible

# Timeouts, conflicts, too many requests; everything from 500 on besides.
_TRY_AGAIN = (408, 409, 425, 429)
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 1.0, 60.0, 600.0
_LOCAL = ("127.0.0.1", "localhost", "::1")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """Where requests go, and how patiently.

    Attributes:
        url: an address, such as `http://127.0.0.1:8000/v1`.
        key: sent as a bearer token; never shown, stored or logged.
        timeout_s: seconds until a request counts as failed.
        retries: how often a request that failed is repeated.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    retries: int = 8


@dataclass(frozen=True)
class RequestFailed:
    """A request that may succeed later.

    Attributes:
        reason: in words.
        after_s: seconds that the server asks to wait.
    """

    reason: str
    after_s: float | None = None


class HttpClient:
    """Sends requests; safe to share between threads.

    Attributes:
        retried: attempts that failed and were repeated.

    Args:
        service: where to.
        error: makes an error of a reason.
        wait: waits so many seconds; `None`: until they are over or `stop` is called.
        draw: uniform numbers of [0, 1), for the jitter of waits.
    """

    def __init__(
        self,
        service: Service,
        error: Callable[[str], UserError],
        wait: Callable[[float], object] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.service, self._error = service, error
        self.retried = 0
        self._stopped = threading.Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._draw = draw
        self._lock = threading.Lock()
        headers = {} if service.key is None else {"Authorization": f"Bearer {service.key}"}
        # A proxy in the environment is for the world outside, not for this machine.
        outside = urlsplit(service.url).hostname not in _LOCAL
        self._http = httpx2.Client(timeout=service.timeout_s, headers=headers, trust_env=outside)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def stop(self) -> None:
        """Let requests that wait for another try give up."""
        self._stopped.set()

    def look(self, path: str) -> None:
        """GET something, once; whatever is answered, somebody is there.

        Raises:
            UserError: nobody answers, or the key is refused.
        """
        try:
            response = self._http.get(self._address(path))
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise self._error(f"no connection ({error or type(error).__name__})") from error
        if response.status_code in (401, 403):
            raise self._error(self._reason(response))

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[httpx2.Response], T | RequestFailed],
        retries: int | None = None,
    ) -> T:
        """Return what `read` makes of the answer to a request.

        Args:
            path: below the service's address.
            body: sent as JSON.
            read: reads an answer of status 200; a `RequestFailed` is tried again.
            retries: instead of the service's.

        Raises:
            UserError: the request is refused, or fails again and again.
        """
        most = self.service.retries if retries is None else retries
        attempt = 0
        while isinstance(found := self._once(path, body, read), RequestFailed):
            if attempt == most or self._stopped.is_set():
                times = f", {attempt + 1} times in a row" if attempt else ""
                raise self._error(found.reason + times)
            with self._lock:
                self.retried += 1
            self._wait(self._pause(attempt, found.after_s))
            attempt += 1
        return found

    def _address(self, path: str) -> str:
        return self.service.url.rstrip("/") + path

    def _once(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[httpx2.Response], T | RequestFailed],
    ) -> T | RequestFailed:
        try:
            response = self._http.post(self._address(path), json=dict(body))
        except httpx2.TimeoutException:
            return RequestFailed(f"no answer within {self.service.timeout_s:g} s")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise self._error(f"no usable address ({error})") from error
        except httpx2.RequestError as error:
            return RequestFailed(f"no connection ({error or type(error).__name__})")
        if response.status_code == 200:
            return read(response)
        reason = self._reason(response)
        final = "insufficient_quota" in response.text  # a 429 that no waiting mends
        if (response.status_code in _TRY_AGAIN or response.status_code >= 500) and not final:
            return RequestFailed(reason, _retry_after(response.headers.get("retry-after")))
        raise self._error(reason)

    def _pause(self, attempt: int, asked_s: float | None) -> float:
        """Return the seconds to wait: what the server asks for, or twice as long each time."""
        if asked_s is not None:
            # Spread by up to a tenth, so that all requests do not come back at once.
            return min(asked_s, _LONGEST_ASKED_S) * (1 + 0.1 * self._draw())
        longest = min(_FIRST_WAIT_S * 2.0**attempt, _LONGEST_WAIT_S)
        return longest * (0.5 + 0.5 * self._draw())

    def _reason(self, response: httpx2.Response) -> str:
        # Some servers repeat the key in their message.
        text = response.text.strip()
        if self.service.key:
            text = text.replace(self.service.key, "***")
        said = " ".join(visible(clipped(text, 300)).split())
        return f"HTTP {response.status_code} {response.reason_phrase}: {said or 'no message'}"


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
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.fromtimestamp(time.time(), UTC)).total_seconds())
