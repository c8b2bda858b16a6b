"""What each row has said so far, on the host, and when it has ended."""

from __future__ import annotations

from rlhf_exp.batch import Finish
from rlhf_exp.rollout.stops import Stopper


class Transcript:
    """The responses of B rows as they grow.

    Args:
        rows: B.
        max_new_tokens: a response's length at most.
        eos_id: the token that ends a response and belongs to it, but not to its content.
        stopper: finds stop strings, or None.

    Attributes:
        responses: token ids of each row.
        content_lengths: of each row that has ended: tokens without what ended it.
        finish: why each row that has ended did.
    """

    def __init__(
        self, rows: int, max_new_tokens: int, eos_id: int, stopper: Stopper | None
    ) -> None:
        self.responses: list[list[int]] = [[] for _ in range(rows)]
        self.content_lengths = [0] * rows
        self.finish = [Finish.LENGTH] * rows
        self._max_new_tokens = max_new_tokens
        self._eos_id = eos_id
        self._stopper = stopper

    def add(self, row: int, token: int) -> bool:
        """Append `token` to `row` and return whether this ends the row."""
        response = self.responses[row]
        response.append(token)
        if token == self._eos_id:
            return self._end(row, len(response) - 1, Finish.EOS)
        if self._stopper is not None and self._stopper.may_complete(token):
            content = self._stopper.content_length(response)
            if content is not None:
                return self._end(row, content, Finish.STOP)
        if len(response) == self._max_new_tokens:
            return self._end(row, len(response), Finish.LENGTH)
        return False

    def _end(self, row: int, content_length: int, finish: Finish) -> bool:
        self.content_lengths[row] = content_length
        self.finish[row] = finish
        return True
