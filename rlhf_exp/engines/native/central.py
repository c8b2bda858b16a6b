"""A reward model that one process holds for all, on a device where nothing trains.

B rows of this process, S tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.scoring import ModelScorer

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
        everyone = self.world.collect(own)
        found = self.world.together(lambda: self._scores(everyone))[0]
        assert found is not None
        sizes = [len(rows[0]) for rows in everyone]
        return found.split(sizes)[self.world.rank]

    def _scores(self, everyone: list[Rows]) -> Tensor | None:
        """Return the scores of all rows, by rank, in the main process."""
        if self.scorer is None:
            return None
        width = max(rows[0].shape[1] for rows in everyone)
        tokens = torch.cat(
            [torch.nn.functional.pad(rows[0], (0, width - rows[0].shape[1])) for rows in everyone]
        )
        lengths = (torch.cat([rows[place] for rows in everyone]) for place in (1, 2))
        return self.scorer(tokens, *lengths)
