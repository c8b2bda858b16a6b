"""A language model behind an OpenAI-compatible endpoint: one POST, tried until it succeeds.

`POST {url}/chat/completions` is what OpenAI, vLLM, SGLang, llama.cpp, Ollama and most gateways
speak. Streams, tools and further parameters are left out.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from rlhf_exp.data.visible import clipped, visible
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.prompt import Message

# Timeouts, conflicts, too many requests; everything from 500 on besides.
_TRY_AGAIN = (408, 409, 425, 429)
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 1.0, 60.0, 600.0
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, and how it is asked.

    Attributes:
        url: base of the API, such as `http://127.0.0.1:8000/v1`.
        model: the model's name there.
        key: sent as a bearer token; never shown, stored or logged.
        timeout_s: seconds until a request counts as failed.
        retries: how often a request that failed is repeated.
        request: further fields of the request's body; a null takes a field out.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    retries: int = 8
    request: Mapping[str, Any] = field(default_factory=dict)

    def body(self, messages: list[Message]) -> dict[str, Any]:
        """Return what is sent; all of it counts for the reply."""
        usual = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 1024}
        return {k: v for k, v in (usual | dict(self.request)).items() if v is not None}


@dataclass(frozen=True)
class Reply:
    """What the model said, and what it cost; 0 tokens where the server does not count."""

    content: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Client:
    """Sends requests; safe to share between threads.

    Args:
        endpoint: where to.
        wait: waits so many seconds; `None`: until they are over or `stop` is called.
        draw: uniform numbers of [0, 1), for the jitter of waits.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        wait: Callable[[float], object] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint = endpoint
        self.retried = 0
        self._stopped = threading.Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._draw = draw
        self._lock = threading.Lock()
        headers = {} if endpoint.key is None else {"Authorization": f"Bearer {endpoint.key}"}
        # A proxy in the environment is for the world outside, not for this machine.
        outside = urlsplit(endpoint.url).hostname not in _LOCAL
        self._http = httpx2.Client(timeout=endpoint.timeout_s, headers=headers, trust_env=outside)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def stop(self) -> None:
        """Let requests that wait for another try give up."""
        self._stopped.set()

    def check(self) -> None:
        """Ask for the list of models, once; an endpoint without one is there all the same.

        Raises:
            UserError: nobody answers, or the key is refused.
        """
        try:
            response = self._http.get(f"{self.endpoint.url.rstrip('/')}/models")
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise self._error(f"no connection ({error or type(error).__name__})") from error
        if response.status_code in (401, 403):
            raise self._error(self._reason(response))

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Return the model's reply to a request.

        Raises:
            UserError: the endpoint refuses the request, or fails again and again.
        """
        attempt = 0
        while isinstance(found := self._once(body), _Failure):
            if attempt == self.endpoint.retries or self._stopped.is_set():
                raise self._error(f"{found.reason}, {attempt + 1} times in a row")
            with self._lock:
                self.retried += 1
            self._wait(self._pause(attempt, found.after_s))
            attempt += 1
        return found

    def _once(self, body: Mapping[str, Any]) -> Reply | _Failure:
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        try:
            response = self._http.post(url, json=dict(body))
        except httpx2.TimeoutException:
            return _Failure(f"no answer within {self.endpoint.timeout_s:g} s")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise self._error(f"no usable address ({error})") from error
        except httpx2.RequestError as error:
            return _Failure(f"no connection ({error or type(error).__name__})")
        if response.status_code == 200:
            return _reply(response)
        reason = self._reason(response)
        final = "insufficient_quota" in response.text  # a 429 that no waiting mends
        if (response.status_code in _TRY_AGAIN or response.status_code >= 500) and not final:
            return _Failure(reason, _retry_after(response.headers.get("retry-after")))
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
        if self.endpoint.key:
            text = text.replace(self.endpoint.key, "***")
        said = " ".join(visible(clipped(text, 300)).split())
        return f"HTTP {response.status_code} {response.reason_phrase}: {said or 'no message'}"

    def _error(self, reason: str) -> UserError:
        point = self.endpoint
        return UserError(
            f"LLM judge {point.model} at {point.url}: {reason}; replies so far are kept, and the "
            "same command asks only for those that are missing"
        )


@dataclass(frozen=True)
class _Failure:
    """A request that may succeed later."""

    reason: str
    after_s: float | None = None


def _reply(response: httpx2.Response) -> Reply | _Failure:
    try:
        found = response.json()
        message = found["choices"][0]["message"]
        usage = found.get("usage") or {}
        return Reply(
            # A refusal, or reasoning that used up all tokens, leaves no content.
            str(message.get("content") or ""),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        start = " ".join(visible(response.text[:80]).split())
        return _Failure(f"no chat completion in the answer ({type(error).__name__}: {start!r})")


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
