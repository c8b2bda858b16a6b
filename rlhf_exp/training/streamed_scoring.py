"""Scores of responses that have ended, while others are still being sampled.

For a scorer that computes elsewhere than the policy: a reward model on a device of its own, a
server. A thread hands it the responses in rounds, in the order in which they end, so that little is
left to score when the last one has ended. Rounds are as many and as large in every process: a
scorer in which all processes take part is called equally often by all.

B rows of this process.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import Tensor

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.training.reward_scorer import Scorer

ROUNDS = 8
"""Rounds in which B responses are scored: what is left at the end is one of them."""


class StreamedScorer:
    """A sampler and a scorer: responses that it has sampled are scored when their turn comes.

    Called with other responses it scores them as its scorer does.

    Args:
        scorer: Called in a thread while the engine answers, and only then: what it shares with
            other processes must not mix with what they exchange meanwhile (`World.for_thread`).
        engine: Answers prompts.
        request: How.
    """

    def __init__(self, scorer: Scorer, engine: RolloutEngine, request: RolloutRequest) -> None:
        self._scorer, self._engine, self._request = scorer, engine, request
        self._stream: _Stream | None = None

    def sample(self, prompts: Prompts) -> Samples:
        """Return a response to each prompt; see `RolloutEngine.answer`."""
        stream = _Stream(self._scorer, prompts, self._request.params.pad_id)
        try:
            request = replace(self._request, on_row=stream.add)
            samples = self._engine.answer(prompts, request)
        except BaseException:
            stream.cancel()
            raise
        stream.add_rest(samples)
        self._stream = stream
        return samples

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`.

        Raises:
            Exception: What the scorer has raised in the thread.
        """
        stream, self._stream = self._stream, None
        if stream is not None:
            scores = stream.scores()
            if stream.holds(tokens, prompt_lengths + content_lengths):
                return scores
        return self._scorer(tokens, prompt_lengths, content_lengths)


class _Stream:
    """The responses to one batch of prompts on their way to the scorer."""

    def __init__(self, scorer: Scorer, prompts: Prompts, pad_id: int) -> None:
        self._scorer, self._pad_id = scorer, pad_id
        rows = zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)
        self._prompts: list[list[int]] = [tokens[:length] for tokens, length in rows]
        self._contents: list[list[int] | None] = [None] * len(prompts)
        self._ended: SimpleQueue[int | None] = SimpleQueue()
        self._scores = torch.zeros(len(prompts))
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def add(self, row: int, response: list[int], content_length: int) -> None:
        """Take a response that has ended."""
        assert self._contents[row] is None, f"row {row} has ended twice"
        self._contents[row] = response[:content_length]
        self._ended.put(row)

    def add_rest(self, samples: Samples) -> None:
        """Take the responses that the engine has not told of."""
        rows = zip(
            samples.tokens.tolist(),
            samples.prompt_lengths.tolist(),
            samples.content_lengths.tolist(),
            strict=True,
        )
        for row, (tokens, start, length) in enumerate(rows):
            if self._contents[row] is None:
                self.add(row, tokens[start:], length)

    def cancel(self) -> None:
        """End the thread: no more responses come."""
        self._ended.put(None)

    def scores(self) -> Tensor:
        """Return the scores [B] when all are there."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._scores

    def holds(self, tokens: Tensor, lengths: Tensor) -> bool:
        """Whether these are the rows, of prompt and content, that were scored."""
        whole = [
            row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        return whole == [self._row(row) for row in range(len(self._prompts))]

    def _row(self, row: int) -> list[int]:
        return [*self._prompts[row], *(self._contents[row] or ())]

    def _run(self) -> None:
        left = len(self._prompts)
        size = -(-left // ROUNDS)
        ended: list[int] = []
        try:
            while left:
                row = self._ended.get()
                if row is None:
                    return
                ended.append(row)
                left -= 1
                if len(ended) == size or not left:
                    self._score(ended)
                    ended = []
        except Exception as error:  # raised again where the scores are asked for
            self._error = error

    def _score(self, rows: list[int]) -> None:
        prompt_lengths = torch.tensor([len(self._prompts[row]) for row in rows])
        whole = [torch.tensor(self._row(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in whole])
        tokens = torch.nn.utils.rnn.pad_sequence(whole, True, self._pad_id)
        found = self._scorer(tokens, prompt_lengths, lengths - prompt_lengths)
        self._scores[rows] = found.float().cpu()
