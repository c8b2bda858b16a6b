"""An HTTP client for JSON services, such as LLM judges and reward servers, that retries requests.

Failed requests are repeated after growing waits with jitter, or after the time that the server asks
for.
"""

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

T = TypeVar("T")
# Timeouts, conflicts, too many requests; everything from 500 on besides.
_RETRIED_STATUSES = (408, 409, 425, 429)
_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRY_AFTER_S = 1.0, 60.0, 600.0
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Service:
    """A service's address, and the timeout and retries of requests to it.

    Attributes:
        url: an address, such as `http://127.0.0.1:8000/v1`.
        key: API key, sent as a bearer token; never shown, stored or logged.
        timeout_s: seconds until a request counts as failed.
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


class HttpClient:
    """Sends requests; safe to share between threads.

    Attributes:
        retried: attempts that failed and were repeated.

    Args:
        service: address, timeout and retries.
        error: returns the exception for a reason.
        wait: waits for a number of seconds; `None`: `stop` ends a wait.
        draw: returns a uniform number in [0, 1), for the jitter of waits.
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
        # A proxy in the environment is not for requests to this machine.
        use_proxy = urlsplit(service.url).hostname not in _LOCAL_HOSTS
        self._http = httpx2.Client(timeout=service.timeout_s, headers=headers, trust_env=use_proxy)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def stop(self) -> None:
        """Make waiting requests give up instead of being repeated."""
        self._stopped.set()

    def check_reachable(self, path: str) -> None:
        """Check with one GET that the service answers; any status but 401 and 403 will do.

        Raises:
            UserError: there is no answer, or the key is refused.
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
        """Send a request until it succeeds and return the result of `read`.

        Args:
            path: below the service's address.
            body: sent as JSON.
            read: parses an answer of status 200; if it returns a `RequestFailed`, the request is
                repeated.
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
        final = "insufficient_quota" in response.text  # a 429 that waiting does not help
        if (response.status_code in _RETRIED_STATUSES or response.status_code >= 500) and not final:
            return RequestFailed(reason, _retry_after(response.headers.get("retry-after")))
        raise self._error(reason)

    def _pause(self, attempt: int, retry_after_s: float | None) -> float:
        """Return the seconds to wait: as the server asks, or twice as long each time."""
        if retry_after_s is not None:
            # Jitter of up to a tenth, so that requests do not all come back at once.
            return min(retry_after_s, _MAX_RETRY_AFTER_S) * (1 + 0.1 * self._draw())
        max_wait_s = min(_FIRST_WAIT_S * 2.0**attempt, _MAX_WAIT_S)
        return max_wait_s * (0.5 + 0.5 * self._draw())

    def _reason(self, response: httpx2.Response) -> str:
        # Some servers repeat the key in their message.
        text = response.text.strip()
        if self.service.key:
            text = text.replace(self.service.key, "***")
        message = " ".join(visible(clipped(text, 300)).split())
        return f"HTTP {response.status_code} {response.reason_phrase}: {message or 'no message'}"


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
