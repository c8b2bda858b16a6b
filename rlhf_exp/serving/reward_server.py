"""The web application of a reward server; the protocol is in `docs/how-to/rewards.md`.

A reward model scores texts, or the token ids that the texts were sampled as. Whoever asks, memory
is bounded: by limits on a request, and because rows are cut before they are padded, and padded with
rows of like length only.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_exp.data.chat_template import history_of_messages
from rlhf_exp.data.rows import History
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.safe_text import clipped, well_formed
from rlhf_exp.training.reward_scorer import ModelScorer

log = logging.getLogger(__name__)

BODY_LIMIT = 32_000_000
"""Most bytes of a request; a thousand long dialogues with their tokens are some ten million."""
ROW_LIMIT = 10_000
"""Most responses of a request."""
TEXT_LIMIT = 1_000_000
"""Most characters of a text, and of the texts that are tokenized at once."""
BODY_TIMEOUT_S = 60.0
"""Time in which a request must have come."""
# Requests that are read at once; further ones wait.
_BODIES = 8


def make_app(scorer: RequestScorer, key: str | None = None) -> Starlette:
    """Return the application.

    Args:
        scorer: Scores the requests.
        key: Bearer token that a request must carry; `None` admits everybody.
    """
    places = asyncio.Semaphore(_BODIES)

    async def score(request: Request) -> Response:
        _check_key(request, key)
        async with places:
            return await answer(await _body(request))

    async def answer(body: bytes) -> Response:
        try:
            scores = await run_in_threadpool(scorer.of_body, body)
        except HTTPException:
            raise
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
        histories: The prompts' dialogues, to be written by the reward model's own chat template, or
            `None`.
    """

    prompts: list[str]
    responses: list[str]
    tokens: list[list[int]] | None
    histories: list[History] | None


def _check_key(request: Request, key: str | None) -> None:
    authorization = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(
        authorization.encode(), f"Bearer {key}".encode()
    ):
        raise HTTPException(401, "this server needs its key as a bearer token")


async def _body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: it is too large, or comes too slowly.
    """
    too_large = HTTPException(413, f"more than {BODY_LIMIT} bytes; send fewer responses at once")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > BODY_LIMIT:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_LIMIT:
                    raise too_large
    except TimeoutError as error:
        text = f"the request did not come within {BODY_TIMEOUT_S:g} s"
        raise HTTPException(408, text, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request was cut off") from error
    return bytes(body)


def _json_value(body: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(body)
    except ValueError as error:
        raise HTTPException(400, f"not JSON: {clipped(str(error), 200)}") from error
    except RecursionError as error:
        raise HTTPException(400, "not a request: its brackets are nested too deeply") from error


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
        longest = max(map(len, texts), default=0)
        if longest > TEXT_LIMIT:
            message = f"a text of {longest} characters in `{name}`; the limit is {TEXT_LIMIT}"
            raise HTTPException(413, message)
    if tokens is not None and not (isinstance(tokens, list) and all(map(_is_row_of_ids, tokens))):
        raise HTTPException(400, "`tokens` must be a list of lists of integers")
    dialogues = fields.get("dialogues")
    if dialogues is not None and not (
        isinstance(dialogues, list) and all(map(_is_dialogue, dialogues))
    ):
        raise HTTPException(400, "`dialogues` must be lists of messages with `role` and `content`")
    given = (prompts, responses, tokens, dialogues)
    sizes = [len(values) for values in given if values is not None]
    if max(sizes) > ROW_LIMIT:
        raise HTTPException(413, f"{max(sizes)} responses; send at most {ROW_LIMIT} at once")
    if len(set(sizes)) > 1:
        raise HTTPException(400, f"the lists have different lengths: {sizes}")
    histories = None if dialogues is None else [history_of_messages(d) for d in dialogues]
    return ScoreRequest(fields["prompts"], fields["responses"], tokens, histories)


def _is_row_of_ids(row: object) -> bool:
    return isinstance(row, list) and all(type(number) is int for number in row)


def _is_dialogue(row: object) -> bool:
    if not isinstance(row, list):
        return False
    if row[:1] and isinstance(row[0], dict) and row[0].get("role") == "system":
        # Some prompt formats write it into the first human turn.
        begins = isinstance(row[0].get("content"), str) and len(row[0]["content"]) <= TEXT_LIMIT
        asked = any(isinstance(message, dict) and message.get("role") == "user" for message in row)
        return begins and asked and _is_dialogue(row[1:])
    return all(
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
        and len(message["content"]) <= TEXT_LIMIT
        for message in row
    )


def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


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

    def of_body(self, body: bytes) -> list[float]:
        """Return the scores that a request's body asks for.

        Raises:
            HTTPException: the body is no valid request.
            ValueError: see `of_tokens`.
        """
        with self._lock:  # reading takes memory, too: one at a time
            request = _parse_request(_json_value(body))
            if request.tokens is not None:
                return self.of_tokens(request.tokens)
            own_template = self.codec.prompt_format == "chat_template"
            histories = request.histories if own_template else None
            return self.of_texts(request.prompts, request.responses, histories)

    def of_texts(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        histories: Sequence[History] | None = None,
    ) -> list[float]:
        """Return the scores of responses, each ended by the end-of-sequence token.

        Args:
            prompts: Texts in the prompt format, or in that of a policy with another tokenizer.
            responses: As many texts.
            histories: The dialogues that are then read in the prompts' place.

        Raises:
            ValueError: The reward model's chat template refuses a dialogue.
        """
        rows: list[list[int]] = []
        texts = prompts
        if histories is not None:
            texts = ["".join(turn.text for turn in history) for history in histories]
        sizes = [len(head) + len(tail) for head, tail in zip(texts, responses, strict=True)]
        for part in _parts_of(sizes, TEXT_LIMIT):
            if histories is None:
                heads = self.codec.encode_decoded([well_formed(text) for text in prompts[part]])
            else:
                heads = self.codec.encode_prompts(histories[part])
            tails = self.codec.encode_responses([well_formed(text) for text in responses[part]])
            rows += [self._end_of(head + tail) for head, tail in zip(heads, tails, strict=True)]
        return self.of_tokens(rows)

    def of_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of rows of ids, each a prompt and a response without its end token.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        size = self.codec.vocab_size
        if any(not 0 <= number < size for row in rows for number in row):
            raise ValueError(f"a token is not in 0 to {size - 1}")
        ends = [self._end_of(row) for row in rows]
        scores = [0.0] * len(rows)
        # Rows of like length together, as in one call of the scorer: one long row among many short
        # ones must not make all of them as long.
        order = sorted(range(len(rows)), key=lambda line: len(ends[line]))
        for start in range(0, len(rows), self.scorer.batch):
            lines = order[start : start + self.scorer.batch]
            lengths = torch.tensor([len(ends[line]) for line in lines])
            tokens = torch.full((len(lines), max(1, int(lengths.max()))), self.codec.pad_id)
            for place, line in enumerate(lines):
                tokens[place, : len(ends[line])] = torch.tensor(ends[line], dtype=torch.int64)
            found = self.scorer(tokens, lengths, torch.zeros_like(lengths)).tolist()
            for line, score in zip(lines, found, strict=True):
                scores[line] = score
        return scores

    def _end_of(self, row: Sequence[int]) -> list[int]:
        """Return the tokens of a row that the scorer reads: longer rows lose their start."""
        return list(row[-self.scorer.seq_length :])


def _parts_of(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Yield slices of consecutive rows whose sizes sum to at most `limit`, or of one row."""
    start = total = 0
    for line, size in enumerate(sizes):
        if line > start and total + size > limit:
            yield slice(start, line)
            start, total = line, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
