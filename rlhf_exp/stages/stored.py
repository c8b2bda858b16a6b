"""Answers of an earlier evaluation, in place of the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_exp.data.rows import Preference
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.answers import Answer, read_answers
from rlhf_exp.stages.asking import Asked, Contestant, Manner
from rlhf_exp.stages.labels import BLANK, CHOSEN, REJECTED, at_step, pairs_part


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
        # The part that asked first asked every model under evaluation.
        first = self._answers[0].part
        names = dict.fromkeys(one.model for one in self._answers if one.part == first)
        others = tuple(at_step(name, "") for name in names)
        found = [name for name in names if not name.startswith(others)]
        self.contestants = tuple(Contestant(name, "") for name in found)

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

    def pairs(self, part: str, load: Callable[[], list[Preference]]) -> dict[str, list[Answer]]:
        """See `Source`."""
        found: dict[str, list[Answer]] = {CHOSEN: [], REJECTED: [], BLANK: []}
        for answer in self._answers:
            if answer.part == pairs_part(part):
                found[answer.model].append(answer)
        return found

    def snapshots(self, part: str, contestant: Contestant) -> tuple[Contestant, ...]:
        """See `Source`."""
        names = dict.fromkeys(answer.model for answer in self._answers if answer.part == part)
        prefix = at_step(contestant.name, "")
        return tuple(Contestant(name, "") for name in names if name.startswith(prefix))
