"""A reward behind an address: prompts and responses go there by HTTP, scores come back.

The protocol is in `docs/rewards.md`: POST `{"prompts": [...], "responses": [...]}`, answered by
`{"scores": [...]}`. An answer may also hold `name` (of what scores) and `tokenizer` (the digest of
the codec it reads with); a server that names the policy's own codec is sent the sampled `tokens`,
so that it reads what a reward model in this process would.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from rlhf_exp.data.visible import visible
from rlhf_exp.errors import UserError
from rlhf_exp.http.client import Failure, Requests, Service

PROBE = ("\n\nHuman: Hello!\n\nAssistant:", "Hello! How can I help you?")
"""Scored to see whether a server is there and keeps to the protocol."""


@dataclass(frozen=True)
class Told:
    """What a server says of itself; both are optional.

    Attributes:
        name: Of what scores.
        tokenizer: Digest of the codec that it reads with (`Codec.digest`).
    """

    name: str | None = None
    tokenizer: str | None = None


class RewardServer:
    """Asks a server for scores.

    Attributes:
        told: What the server said of itself at first; `None` before.

    Args:
        service: Where it is.
        size: Responses of one request.
        name: The name that it must give itself, if it gives itself one.
        wait: See `Requests`.
        draw: See `Requests`.
    """

    def __init__(
        self,
        service: Service,
        size: int = 64,
        name: str | None = None,
        wait: Callable[[float], object] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.service, self.size, self.name = service, size, name
        self.told: Told | None = None
        self._requests = Requests(service, self._error, wait, draw)

    def check(self) -> Told:
        """Let one response be scored, without a second try; return what the server is.

        Raises:
            UserError: Nobody answers, or not as the protocol says, or another reward.
        """
        self._ask([PROBE[0]], [PROBE[1]], None, retries=0)
        assert self.told is not None
        return self.told

    def scores(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """Return a finite score for each response.

        Args:
            prompts: As the policy read them.
            responses: Their contents.
            tokens: The ids of each prompt with its response, for a server with the same codec.

        Raises:
            UserError: See `check`; or the server failed again and again.
        """
        found: list[float] = []
        for start in range(0, len(prompts), self.size):
            part = slice(start, start + self.size)
            some = None if tokens is None else tokens[part]
            found += self._ask(prompts[part], responses[part], some)
        return found

    def _ask(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokens: Sequence[Sequence[int]] | None,
        retries: int | None = None,
    ) -> list[float]:
        body: dict[str, Any] = {"prompts": list(prompts), "responses": list(responses)}
        if tokens is not None:
            body["tokens"] = [list(row) for row in tokens]
        return self._requests.post(
            "", body, lambda response: self._read(response, responses), retries
        )

    def _read(self, response: httpx2.Response, responses: Sequence[str]) -> list[float] | Failure:
        try:
            answer = response.json()
        except ValueError:
            # A proxy's page, or one that was cut off.
            start = " ".join(visible(response.text[:80]).split())
            return Failure(f"no JSON in the answer ({start!r})")
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._error('expected {"scores": [...]}, one number for each response')
        if len(scores) != len(responses):
            raise self._error(f"{len(scores)} scores for {len(responses)} responses")
        for score, text in zip(scores, responses, strict=True):
            if not _is_finite(score):
                raise self._error(
                    f"{score!r} for the response {text[:80]!r}; expected a finite number"
                )
        self._recognise(answer)
        return [float(score) for score in scores]

    def _recognise(self, answer: dict[str, Any]) -> None:
        """Make sure that it is the reward expected, and the same as before.

        Raises:
            UserError: It is another one.
        """
        name, tokenizer = (answer.get(key) for key in ("name", "tokenizer"))
        if not all(one is None or isinstance(one, str) for one in (name, tokenizer)):
            raise self._error("`name` and `tokenizer`, if they are given, must be texts")
        if self.name is not None and name is not None and name != self.name:
            raise self._error(
                f"it scores with {name!r}, but ppo.reward.name={self.name}; start the server with "
                "that reward, or name the one that it has"
            )
        told = Told(name, tokenizer)
        if self.told is not None and told != self.told:
            raise self._error(
                f"it scores with {name!r} now, and with {self.told.name!r} before; a run needs one "
                "reward throughout"
            )
        self.told = told

    def _error(self, reason: str) -> UserError:
        return UserError(f"ppo.reward.url={self.service.url}: {reason}")


def _is_finite(score: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        return False
    try:
        return math.isfinite(score)
    except OverflowError:
        return False
