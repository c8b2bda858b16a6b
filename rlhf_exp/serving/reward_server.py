"""The web application of a reward server; the protocol is in `docs/rewards.md`.

A reward model that scores texts, or the token ids that they were sampled as.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.training.reward_scorer import ModelScorer

log = logging.getLogger(__name__)

BODY_LIMIT = 64_000_000
"""Bytes of a request; a thousand long dialogues with their tokens are some ten million."""


@dataclass(frozen=True)
class _Asked:
    """A request.

    Attributes:
        prompts: Texts.
        responses: As many texts.
        tokens: As many rows of token ids, if there are any.
    """

    prompts: list[str]
    responses: list[str]
    tokens: list[list[int]] | None


def make_app(scores: RequestScorer, key: str | None = None) -> Starlette:
    """Return the application.

    Args:
        scores: What scores.
        key: What a request must carry as bearer token; `None`: anybody may ask.
    """

    async def score(request: Request) -> Response:
        _check_key(request, key)
        asked = _asked(await _body(request))
        try:
            found = await run_in_threadpool(_scored, scores, asked)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        # The client shows what went wrong here, such as a device without memory.
        except Exception as error:
            log.exception("scoring failed")
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        if not all(map(math.isfinite, found)):
            raise HTTPException(500, "the reward model gives scores that are not finite")
        told = {"name": scores.name, "tokenizer": scores.codec.digest}
        return JSONResponse({"scores": found, **told})

    return Starlette(
        routes=[Route("/", score, methods=["POST"])], exception_handlers={HTTPException: _refused}
    )


def _scored(scores: RequestScorer, asked: _Asked) -> list[float]:
    if asked.tokens is not None:
        return scores.of_tokens(asked.tokens)
    return scores.of_texts(asked.prompts, asked.responses)


def _check_key(request: Request, key: str | None) -> None:
    given = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise HTTPException(401, "this server needs its key as a bearer token")


async def _body(request: Request) -> Any:  # noqa: ANN401 - JSON
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise HTTPException(413, f"more than {BODY_LIMIT} bytes; send fewer responses at once")
    try:
        return json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {error}") from error


def _asked(content: Any) -> _Asked:  # noqa: ANN401 - JSON
    """Return the request in a JSON value.

    Raises:
        HTTPException: it is none.
    """
    given = content if isinstance(content, dict) else {}
    prompts, responses = given.get("prompts"), given.get("responses")
    tokens = given.get("tokens")
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise HTTPException(400, f"`{name}` must be a list of texts")
    if tokens is not None and not (isinstance(tokens, list) and all(map(_are_ids, tokens))):
        raise HTTPException(400, "`tokens` must be a list of lists of integers")
    sizes = [len(one) for one in (prompts, responses, tokens) if one is not None]
    if len(set(sizes)) > 1:
        raise HTTPException(400, f"the lists have different lengths: {sizes}")
    return _Asked(given["prompts"], given["responses"], tokens)


def _are_ids(row: object) -> bool:
    return isinstance(row, list) and all(type(number) is int for number in row)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class RequestScorer:
    """Scores one request at a time.

    Attributes:
        name: Of the reward: it changes with all that decides the scores.

    Args:
        scorer: Of the reward model, for its own codec.
        codec: The same codec.
        name: See above.
    """

    def __init__(self, scorer: ModelScorer, codec: Codec, name: str) -> None:
        self.scorer, self.codec, self.name = scorer, codec, name
        self._lock = threading.Lock()

    def of_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the scores of responses, each ended by the end-of-sequence token."""
        heads = self.codec.encode_decoded(prompts)
        tails = self.codec.encode_responses(responses)
        return self.of_tokens([head + tail for head, tail in zip(heads, tails, strict=True)])

    def of_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of prompts and responses as ids, without what ended the responses.

        Raises:
            ValueError: An id is none of this tokenizer's.
        """
        if not rows:
            return []
        size = self.codec.vocab_size
        if any(not 0 <= number < size for row in rows for number in row):
            raise ValueError(f"a token is not in 0 to {size - 1}")
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), max(1, int(lengths.max()))), self.codec.pad_id)
        for line, row in enumerate(rows):
            tokens[line, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        with self._lock:
            return self.scorer(tokens, lengths, torch.zeros_like(lengths)).tolist()
