"""A language model as a judge (Zheng et al. 2023, "Judging LLM-as-a-judge", sections 3.3 and 3.4).

Each pair is judged twice, with either answer first; what the two verdicts do not agree on is a tie.
How often the answer shown first wins says how much the order decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from rlhf_exp.evaluation.agreement import SideBias, side_bias
from rlhf_exp.evaluation.judges.endpoint import Client, Reply
from rlhf_exp.evaluation.judges.judge import Pair, Verdict
from rlhf_exp.evaluation.judges.prompt import (
    CRITERION,
    Message,
    asked_again,
    question,
    read_verdict,
    reasons,
)
from rlhf_exp.evaluation.judges.replies import Replies


@dataclass(frozen=True)
class Usage:
    """What judging took.

    Attributes:
        requests: replies that were asked for now, repeated attempts not counted.
        cached: replies that were there already.
        retried: attempts that failed and were repeated.
        prompt_tokens: of all replies used, cached ones included.
        completion_tokens: likewise.
        unparsed: pairs without a readable verdict in at least one order.
    """

    requests: int
    cached: int
    retried: int
    prompt_tokens: int
    completion_tokens: int
    unparsed: int


@dataclass(frozen=True)
class _Said:
    """The outcome of one order.

    Attributes:
        choice: -1 for the first answer, 1 for the second, 0 for a tie, `None` if unreadable.
        content: the first reply.
        replies: all replies it took.
        cached: how many of them were there already.
    """

    choice: int | None
    content: str
    replies: tuple[Reply, ...]
    cached: int


class LLMJudge:
    """Asks a language model.

    Attributes:
        name: the model's name.
        usage: what the last call of `verdicts` took.

    Args:
        client: sends the requests.
        replies: those that are known already; new ones are added at once.
        criterion: what "better" means, to follow "more".
        concurrency: requests under way at once.
        tell: called with the number of replies so far, out of two for each pair.
    """

    def __init__(
        self,
        client: Client,
        replies: Replies,
        criterion: str = CRITERION,
        concurrency: int = 8,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name = client.endpoint.model
        self.client, self.replies = client, replies
        self.criterion, self.concurrency, self.tell = criterion, concurrency, tell
        self.usage = Usage(0, 0, 0, 0, 0, 0)

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """See `Judge`. Identical answers tie without being shown.

        Raises:
            UserError: the endpoint refuses a request, or fails again and again.
        """
        retried = self.client.retried
        orders = [
            (row, swapped)
            for row, pair in enumerate(pairs)
            if not pair.identical
            for swapped in (False, True)
        ]
        said = self._all(pairs, orders)
        verdicts = [
            Verdict(0) if pair.identical else _verdict(said[row, False], said[row, True])
            for row, pair in enumerate(pairs)
        ]
        replies = [reply for one in said.values() for reply in one.replies]
        cached = sum(one.cached for one in said.values())
        self.usage = Usage(
            requests=len(replies) - cached,
            cached=cached,
            retried=self.client.retried - retried,
            prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            completion_tokens=sum(reply.completion_tokens for reply in replies),
            unparsed=sum(verdict.unparsed for verdict in verdicts),
        )
        return verdicts

    def _all(
        self, pairs: Sequence[Pair], orders: Sequence[tuple[int, bool]]
    ) -> dict[tuple[int, bool], _Said]:
        found: dict[tuple[int, bool], _Said] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            waiting: dict[Future[_Said], tuple[int, bool]] = {
                pool.submit(self._one, pairs[row], swapped): (row, swapped)
                for row, swapped in orders
            }
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                self.tell(len(found), len(orders))
        except BaseException:
            self.client.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _one(self, pair: Pair, swapped: bool) -> _Said:
        answers = (pair.answer_b, pair.answer_a) if swapped else (pair.answer_a, pair.answer_b)
        messages = question(pair.prompt, *answers, self.criterion)
        reply, cached = self._reply(messages)
        choice = read_verdict(reply.content)
        if choice is not None:
            return _Said(choice, reply.content, (reply,), int(cached))
        # The same question would get the same reply, so it is a further turn.
        again, known = self._reply(asked_again(messages, reply.content))
        choice = read_verdict(again.content)
        return _Said(choice, reply.content, (reply, again), int(cached) + int(known))

    def _reply(self, messages: list[Message]) -> tuple[Reply, bool]:
        """Return the reply, and whether it was there already."""
        body = self.client.endpoint.body(messages)
        known = self.replies.get(body)
        if known is not None:
            return known, True
        reply = self.client.ask(body)
        self.replies.add(body, reply)
        return reply, False


def first_place(verdicts: Sequence[Verdict]) -> SideBias:
    """Count how often the answer shown first won, over both orders, ties left out."""
    first = second = 0
    for verdict in verdicts:
        a_first, b_first = verdict.orders or (None, None)
        first += (a_first == -1) + (b_first == 1)
        second += (a_first == 1) + (b_first == -1)
    return side_bias(first, second)


def consistent(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """Return the pairs on which both orders said the same, and those where both were read."""
    both = [one.orders for one in verdicts if one.orders is not None and None not in one.orders]
    return sum(a_first == b_first for a_first, b_first in both), len(both)


def _verdict(straight: _Said, swapped: _Said) -> Verdict:
    a_first = straight.choice
    b_first = None if swapped.choice is None else -swapped.choice
    unparsed = a_first is None or b_first is None
    sign = a_first if a_first is not None and a_first == b_first else 0
    reason = f"first order: {reasons(straight.content)}\nsecond order: {reasons(swapped.content)}"
    return Verdict(sign, reason=reason, orders=(a_first, b_first), unparsed=unparsed)
