"""Answers of an earlier evaluation, in place of the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, read_answers
from rlhf_exp.stages.bench import Asked, Contestant, Manner


class StoredSource:
    """Hands out what `samples.jsonl` holds.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers = read_answers(path)
        if not self._answers:
            raise UserError(f"eval.samples: {path} holds no answers")
        names = dict.fromkeys(answer.model for answer in self._answers)
        self.contestants = tuple(Contestant(name, "") for name in names)

    def asked(self, part: str, load: Callable[[], list[Asked]]) -> list[Asked]:
        """See `Source`."""
        first = self.contestants[0].name
        firsts = {
            answer.row: answer
            for answer in reversed(self._answers)
            if (answer.part, answer.model) == (part, first)
        }
        if not firsts:
            parts = ", ".join(dict.fromkeys(answer.part for answer in self._answers))
            raise UserError(
                f"eval.samples: {self.path} has no answers for {part}, only for {parts}; choose "
                "another eval suite, or evaluate the models themselves"
            )
        return [Asked(text=firsts[row].prompt, facts=firsts[row].facts) for row in sorted(firsts)]

    def answers(
        self, part: str, contestant: Contestant, asked: Sequence[Asked], manner: Manner
    ) -> list[Answer]:
        """See `Source`."""
        mine = {
            (answer.row, answer.sample): answer
            for answer in self._answers
            if (answer.part, answer.model) == (part, contestant.name)
        }
        try:
            found = [
                mine[row, sample] for row in range(len(asked)) for sample in range(manner.count)
            ]
        except KeyError as error:
            row, sample = error.args[0]
            raise UserError(
                f"eval.samples: {self.path} has no answer {sample + 1} of {contestant.name} to "
                f"prompt {row + 1} of {part}; ask for fewer, or evaluate the models themselves"
            ) from error
        unscored = sum(answer.score is None for answer in found)
        if manner.score and unscored:
            raise UserError(
                f"eval.samples: {unscored} answers of {contestant.name} in {self.path} have no "
                f"score, which {part} needs; evaluate the models themselves"
            )
        return found
