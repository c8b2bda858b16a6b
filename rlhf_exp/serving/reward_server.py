"""The web application of a reward server; the protocol is in `docs/rewards.md`.

A reward model scores texts, or the token ids that the texts were sampled as.
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


def make_app(scorer: RequestScorer, key: str | None = None) -> Starlette:
    """Return the application.

    Args:
        scorer: Scores the requests.
        key: Bearer token that a request must carry; `None` admits everybody.
    """

    async def score(request: Request) -> Response:
        _check_key(request, key)
        score_request = _parse_request(await _json_body(request))
        try:
            scores = await run_in_threadpool(_scores_of, scorer, score_request)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        # The client shows the error to its user, such as a device out of memory.
        except Exception as error:
            log.exception("scoring failed")
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        if not all(map(math.isfinite, scores)):
            raise HTTPException(500, "the reward model gives scores that are not finite")
        identity = {"name": scorer.name, "tokenizer": scorer.codec.digest}
        return JSONResponse({"scores": scores, **identity})

    return Starlette(
        routes=[Route("/", score, methods=["POST"])],
        exception_handlers={HTTPException: _error_response},
    )


@dataclass(frozen=True)
class ScoreRequest:
    """A request to score responses.

    Attributes:
        prompts: Texts.
        responses: As many texts.
        tokens: As many rows of token ids of prompt and response, or `None`.
    """

    prompts: list[str]
    responses: list[str]
    tokens: list[list[int]] | None


def _scores_of(scorer: RequestScorer, request: ScoreRequest) -> list[float]:
    if request.tokens is not None:
        return scorer.of_tokens(request.tokens)
    return scorer.of_texts(request.prompts, request.responses)


def _check_key(request: Request, key: str | None) -> None:
    authorization = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(
        authorization.encode(), f"Bearer {key}".encode()
    ):
        raise HTTPException(401, "this server needs its key as a bearer token")


async def _json_body(request: Request) -> Any:  # noqa: ANN401 - JSON
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise HTTPException(413, f"more than {BODY_LIMIT} bytes; send fewer responses at once")
    try:
        return json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {error}") from error


def _parse_request(content: Any) -> ScoreRequest:  # noqa: ANN401 - JSON
    """Return the request in a JSON value.

    Raises:
        HTTPException: the value is no valid request.
    """
    fields = content if isinstance(content, dict) else {}
    prompts, responses = fields.get("prompts"), fields.get("responses")
    tokens = fields.get("tokens")
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise HTTPException(400, f"`{name}` must be a list of texts")
    if tokens is not None and not (isinstance(tokens, list) and all(map(_is_row_of_ids, tokens))):
        raise HTTPException(400, "`tokens` must be a list of lists of integers")
    sizes = [len(values) for values in (prompts, responses, tokens) if values is not None]
    if len(set(sizes)) > 1:
        raise HTTPException(400, f"the lists have different lengths: {sizes}")
    return ScoreRequest(fields["prompts"], fields["responses"], tokens)


def _is_row_of_ids(row: object) -> bool:
    return isinstance(row, list) and all(type(number) is int for number in row)


def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class RequestScorer:
    """Scores one request at a time.

    Attributes:
        name: The reward's name, which changes with everything that decides the scores.

    Args:
        scorer: The reward model's scorer, for its own codec.
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
        """Return the scores of rows of ids, each a prompt and a response without its end token.

        Raises:
            ValueError: An id is not in the vocabulary.
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
