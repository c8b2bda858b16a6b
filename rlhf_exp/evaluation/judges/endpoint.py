"""A language model behind an OpenAI-compatible endpoint.

`POST {url}/chat/completions` is what OpenAI, vLLM, SGLang, llama.cpp, Ollama and most gateways
speak. Streams, tools and further parameters are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2

from rlhf_exp.data.visible import visible
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.prompt import Message
from rlhf_exp.http.client import Failure, Requests, Service


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
        service = Service(endpoint.url, endpoint.key, endpoint.timeout_s, endpoint.retries)
        self._requests = Requests(service, self._error, wait, draw)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._requests.close()

    @property
    def retried(self) -> int:
        """Attempts that failed and were repeated."""
        return self._requests.retried

    def stop(self) -> None:
        """Let requests that wait for another try give up."""
        self._requests.stop()

    def check(self) -> None:
        """Ask for the list of models, once; an endpoint without one is there all the same.

        Raises:
            UserError: nobody answers, or the key is refused.
        """
        self._requests.look("/models")

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Return the model's reply to a request.

        Raises:
            UserError: the endpoint refuses the request, or fails again and again.
        """
        return self._requests.post("/chat/completions", body, _reply)

    def _error(self, reason: str) -> UserError:
        point = self.endpoint
        return UserError(
            f"LLM judge {point.model} at {point.url}: {reason}; replies so far are kept, and the "
            "same command asks only for those that are missing"
        )


def _reply(response: httpx2.Response) -> Reply | Failure:
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
        return Failure(f"no chat completion in the answer ({type(error).__name__}: {start!r})")
