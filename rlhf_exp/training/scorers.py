"""Scores from elsewhere than a reward model in this process.

- `CentralScorer`: one process has the reward model, on a device where nothing trains.
- `FunctionScorer`: a function of the user's own.
- `ServerScorer`: a reward server, asked by a `RewardClient`.

The server's protocol is in `docs/how-to/rewards.md`: POST `{"prompts": [...], "responses": [...]}`,
answered by `{"scores": [...]}`. An answer may also hold `name` (of the reward) and `tokenizer` (the
digest of the codec it reads with); a server that names the policy's own codec is sent the sampled
`tokens`, so that it reads exactly the ids that a reward model in this process would. One that names
another codec is sent the `dialogues` of prompts in a chat template, to write them in its own. One
that answers `"rows": true` is sent the `rows` of the prompts.

B rows of this process, S tokens of a row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.data.chat_template import messages_of_history
from rlhf_exp.data.rows import History
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.function_source import takes_rows
from rlhf_exp.http_client import HttpClient, Service
from rlhf_exp.training.reward_scorer import (
    ModelScorer,
    PromptRows,
    Scorer,
    contents_of,
    texts_of,
)
from rlhf_exp.user_function import MAX_FLOAT32, UserFunction, load_function

Rows = tuple[Tensor, Tensor, Tensor]


class CentralScorer:
    """Sends all processes' rows to the main one and their scores back; all of them take part.

    Attributes:
        scorer: Of the main process; `None` in the others.

    Args:
        scorer: The same.
        world: The processes.
    """

    def __init__(self, scorer: ModelScorer | None, world: World) -> None:
        assert (scorer is not None) == world.is_main, "the main process alone has the model"
        self.scorer, self.world = scorer, world

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`."""
        own = (tokens.cpu(), prompt_lengths.cpu(), content_lengths.cpu())
        everyone = self.world.all_gather_object(own)
        scores = self.world.run_on_all(lambda: self._scores(everyone))[0]
        assert scores is not None
        sizes = [len(rows[0]) for rows in everyone]
        return scores.split(sizes)[self.world.rank]

    def _scores(self, everyone: list[Rows]) -> Tensor | None:
        """Return the scores of all rows, by rank, in the main process."""
        if self.scorer is None:
            return None
        width = max(rows[0].shape[1] for rows in everyone)
        tokens = torch.cat(
            [torch.nn.functional.pad(rows[0], (0, width - rows[0].shape[1])) for rows in everyone]
        )
        lengths = (torch.cat([rows[column] for rows in everyone]) for column in (1, 2))
        return self.scorer(tokens, *lengths)


class FunctionScorer:
    """Scores by a user's function of texts.

    Attributes:
        rows: Of the prompts to be scored, for a function that takes them.

    Args:
        function: Takes lists of prompts and responses, and of rows if it likes.
        codec: Turns token ids into the texts that the function reads.
    """

    def __init__(self, function: RewardFunction, codec: Codec) -> None:
        self.function, self.codec, self.rows = function, codec, PromptRows()

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`.

        Raises:
            UserError: See `UserFunction`.
        """
        prompts, responses = texts_of(tokens, prompt_lengths, content_lengths, self.codec)
        rows = self.rows.fields(tokens, prompt_lengths) if self.function.reads_rows else None
        return torch.tensor(self.function.scores(prompts, responses, rows), dtype=torch.float32)


class RewardFunction:
    """A user's reward function, of prompts and responses, and of rows if it takes them.

    Attributes:
        reads_rows: Whether it does.

    Args:
        reference: `file.py:name` or `package.module:name`.
        key: The config key that names it, for errors.

    Raises:
        UserError: The file cannot be run, or has no function of that name, or one that takes
            something else.
    """

    def __init__(self, reference: str, key: str = "ppo.reward.function") -> None:
        function, name = load_function(reference, key), f"{key}={reference}"
        try:
            self.reads_rows = takes_rows(signature(function))
        except TypeError as error:
            raise UserError(f"{name}: {error}") from error
        except ValueError:  # one without a signature, such as a builtin
            self.reads_rows = False
        self._function, self._name = function, name

    def scores(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[Mapping[str, object]] | None = None,
    ) -> list[float]:
        """Return a finite score for each response.

        Args:
            prompts: As the policy read them.
            responses: Their contents.
            rows: What is known of each prompt's row; not without `reads_rows`.

        Raises:
            UserError: See `UserFunction`.
        """
        function = self._function
        if self.reads_rows:
            assert rows is not None, "the function takes rows"
            copies = deepcopy(list(rows))  # a function may change what it is given
            function = lambda *texts: self._function(*texts, copies)  # noqa: E731
        return UserFunction(function, self._name, "response")(prompts, responses)


def set_rows(scorer: Scorer, rows: PromptRows) -> None:
    """Give a scorer the rows of the prompts that it will be handed as token ids."""
    inner = scorer.scorer if isinstance(scorer, CentralScorer) else scorer
    if isinstance(inner, ModelScorer | ServerScorer | FunctionScorer):
        inner.rows = rows


def reads_rows(scorer: Scorer) -> bool:
    """Return whether a scorer's numbers depend on other fields of the rows than the prompt."""
    if isinstance(scorer, FunctionScorer):
        return scorer.function.reads_rows
    return isinstance(scorer, ServerScorer) and scorer.client.reads_rows


class ServerScorer:
    """Scores by a server; each process sends its own rows.

    Attributes:
        rows: Of the prompts to be scored, for a server that asks for them, or has another chat
            template.

    Args:
        client: Asks the server.
        codec: Of the policy.
    """

    def __init__(self, client: RewardClient, codec: Codec) -> None:
        self.client, self.codec, self.rows = client, codec, PromptRows()

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`.

        Raises:
            UserError: See `RewardClient.scores`.
        """
        prompts, responses = texts_of(tokens, prompt_lengths, content_lengths, self.codec)
        ids = None
        info = self.client.info
        if info is not None and info.tokenizer == self.codec.digest:
            lengths = (prompt_lengths + content_lengths).tolist()
            ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        histories = None
        if self.client.reads_dialogues(self.codec):
            histories = self.rows.histories(tokens, prompt_lengths)
            responses = contents_of(tokens, prompt_lengths, content_lengths, self.codec)
        rows = self.rows.fields(tokens, prompt_lengths) if self.client.reads_rows else None
        scores = self.client.scores(prompts, responses, ids, histories, rows)
        return torch.tensor(scores, dtype=torch.float32)


PROBE = ("\n\nHuman: Hello!\n\nAssistant:", "Hello! How can I help you?")
"""A prompt and a response, scored to see whether a server answers as the protocol says."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's word on itself; all of it is optional.

    Attributes:
        name: Of the reward.
        tokenizer: Digest of the codec that it reads with (`Codec.digest`).
        rows: Whether it asks for the rows of the prompts.
    """

    name: str | None = None
    tokenizer: str | None = None
    rows: bool = False


class RewardClient:
    """Asks a server for scores.

    Attributes:
        info: The server's word on itself, from its first answer; `None` before.

    Args:
        service: Where it is.
        size: Responses of one request.
        name: The name that it must give itself, if it gives itself one.
        wait: See `HttpClient`.
        draw: See `HttpClient`.
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
        self.info: ServerInfo | None = None
        self._requests = HttpClient(service, self._error, wait, draw)

    def check(self) -> ServerInfo:
        """Have one response scored, without a second try; return the server's word on itself.

        Raises:
            UserError: Nobody answers, or not as the protocol says, or another reward.
        """
        self._ask([PROBE[0]], [PROBE[1]], None, retries=0)
        assert self.info is not None
        return self.info

    def scores(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokens: Sequence[Sequence[int]] | None = None,
        histories: Sequence[History] | None = None,
        rows: Sequence[Mapping[str, object]] | None = None,
    ) -> list[float]:
        """Return a finite score for each response.

        Args:
            prompts: As the policy read them.
            responses: Their contents.
            tokens: The ids of each prompt with its response, for a server with the same codec.
            histories: The prompts' dialogues, for a server that writes them by its own template.
            rows: What is known of each prompt's row, for a server that asks for it.

        Raises:
            UserError: See `check`; or the server failed again and again.
        """
        scores: list[float] = []
        for start in range(0, len(prompts), self.size):
            part = slice(start, start + self.size)
            ids = None if tokens is None else tokens[part]
            dialogues = None if histories is None else histories[part]
            asked = None if rows is None else rows[part]
            scores += self._ask(prompts[part], responses[part], ids, dialogues, asked)
        return scores

    @property
    def reads_rows(self) -> bool:
        """Whether the server asks for the rows of the prompts."""
        return self.info is not None and self.info.rows

    def reads_dialogues(self, codec: Codec) -> bool:
        """Return whether the server has a reward model with another chat template than a policy."""
        own = None if self.info is None else self.info.tokenizer
        return codec.prompt_format == "chat_template" and own not in (None, codec.digest)

    def _ask(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokens: Sequence[Sequence[int]] | None,
        histories: Sequence[History] | None = None,
        rows: Sequence[Mapping[str, object]] | None = None,
        retries: int | None = None,
    ) -> list[float]:
        body: dict[str, Any] = {"prompts": list(prompts), "responses": list(responses)}
        if tokens is not None:
            body["tokens"] = [list(row) for row in tokens]
        if histories is not None:
            body["dialogues"] = [messages_of_history(history) for history in histories]
        if rows is not None:
            # Of the hub's types, some are not JSON's: a date, for instance.
            body["rows"] = json.loads(json.dumps(list(rows), default=str))
        return self._requests.post("", body, lambda answer: self._read(answer, responses), retries)

    def _read(self, answer: Any, responses: Sequence[str]) -> list[float]:  # noqa: ANN401 - JSON
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._error('expected {"scores": [...]}, one number for each response')
        if len(scores) != len(responses):
            raise self._error(f"{len(scores)} scores for {len(responses)} responses")
        for score, text in zip(scores, responses, strict=True):
            if not _is_finite(score):
                raise self._error(
                    f"{repr(score)[:80]} for the response {text[:80]!r}; expected a finite number"
                )
        self._recognise(answer)
        return [float(score) for score in scores]

    def _recognise(self, answer: dict[str, Any]) -> None:
        """Check that the server has the reward expected, and the same as before.

        Raises:
            UserError: It is another one.
        """
        name, tokenizer, rows = (answer.get(key) for key in ("name", "tokenizer", "rows"))
        if not all(text is None or isinstance(text, str) for text in (name, tokenizer)):
            raise self._error("`name` and `tokenizer`, if they are given, must be texts")
        if rows not in (None, False, True):
            raise self._error("`rows`, if it is given, must be true or false")
        if self.name is not None and name is not None and name != self.name:
            raise self._error(
                f"it scores with {name!r}, but ppo.reward.name={self.name}; start the server with "
                "that reward, or name the one that it has"
            )
        info = ServerInfo(name, tokenizer, rows is True)
        if self.info is not None and info != self.info:
            raise self._error(
                f"it scores with {name!r} now, and with {self.info.name!r} before; a run needs one "
                "reward throughout"
            )
        self.info = info

    def _error(self, reason: str) -> UserError:
        return UserError(f"ppo.reward.url={self.service.url}: {reason}")


def _is_finite(score: object) -> bool:
    """Whether a JSON value is a number that a 32-bit float can hold."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        return False
    return abs(score) <= MAX_FLOAT32  # false for NaN
