"""Which row sits in which slot, on the host and on the device.

The active slots are the first ones. A slot whose row has ended runs on until it is cleared away:
its position and column stop at the last one, and what it writes meanwhile is cut off in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class SlotTable:
    """The slots of one sampling call.

    Args:
        slots: how many there are.
        max_new_tokens: T, a response's length at most.
        device: of the model.
        spare: positions that a row may run on to after its last token.

    Attributes:
        slots: how many there are.
        held: row in each active slot, or None where it has ended.
        row: [slots] int64, the same on the device, an ended row included.
        token: [slots] int64, to feed next.
        position: [slots] int64, of that token; before the first one, that of the prompt's end.
        column: [slots] int64, number of the response token to draw next; T once all are drawn.
        closing: of each active slot, how many tokens are still fed to a row that has ended.
    """

    def __init__(
        self, slots: int, max_new_tokens: int, device: torch.device, spare: int = 0
    ) -> None:
        self.held: list[int | None] = []
        self.closing: list[int] = []
        self.slots = slots
        self._max_new_tokens, self._spare = max_new_tokens, spare
        self._state = torch.zeros(7, slots, dtype=torch.int64, device=device)
        self.row, self.token, self.position, self.column, _, _, self._shift = self._state
        self._moving, self._limits = self._state[2:4], self._state[4:6]
        self._host_position = np.zeros(slots, dtype=np.int64)

    @property
    def active(self) -> int:
        """Slots that take part in a forward, those of ended rows included."""
        return len(self.held)

    @property
    def ended(self) -> int:
        """Active slots whose row has ended."""
        return self.held.count(None)

    @property
    def free(self) -> int:
        """Slots that are not active."""
        return self.slots - len(self.held)

    @property
    def longest(self) -> int:
        """Columns in use: above the position of every active slot."""
        return int(self._host_position[: self.active].max()) + 1

    def fill(self, rows: Sequence[int], prompt_lengths: Sequence[int]) -> slice:
        """Give each of `rows` a slot and return these slots."""
        slots = slice(self.active, self.active + len(rows))
        self.held.extend(rows)
        self.closing.extend([0] * len(rows))
        ends = np.asarray(prompt_lengths, dtype=np.int64) - 1
        zeros = np.zeros_like(ends)
        last_column = zeros + self._max_new_tokens
        last_position = ends + last_column + self._spare
        values = np.stack([np.asarray(rows), zeros, ends, zeros, last_position, last_column, zeros])
        self._state[:, slots] = torch.from_numpy(values).to(self._state.device)
        self._host_position[slots] = ends
        return slots

    def advance(self, slots: slice, tokens: Tensor) -> None:
        """Take the tokens drawn for `slots` as the next ones to feed."""
        self.token[slots] = tokens
        moving = self._moving[:, slots]
        torch.minimum(moving.add_(1), self._limits[:, slots], out=moving)
        self._host_position[slots] += 1

    def feed(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        more: int,
        kept: int | None = None,
    ) -> None:
        """Let the rows in `slots`, which have ended, be fed one token more.

        Args:
            slots: N of the active ones.
            tokens: N, to feed them.
            positions: N, of these in their rows.
            more: how many are still fed to these rows, this one included.
            kept: the column that the states of this one are kept in, and of none that follows;
                as always, if not given.
        """
        for slot, position in zip(slots, positions, strict=True):
            self.closing[slot] = more
            self._host_position[slot] = position
        values = torch.tensor([slots, tokens, positions], dtype=torch.int64)
        at, tokens_at, positions_at = values.to(self._state.device)
        self.token[at] = tokens_at
        self.position[at] = positions_at
        if kept is not None:
            self._shift[at] = kept - positions_at

    def fed(self) -> list[int]:
        """Count the token fed to each closing row; let those go that are fed no more.

        Returns:
            The slots of rows that are fed more.
        """
        for slot, more in enumerate(self.closing):
            if more:
                self.closing[slot] = more - 1
                if more == 1:
                    self.held[slot] = None
        return [slot for slot, more in enumerate(self.closing) if more]

    def kept_at(self, kept: int) -> Tensor:
        """Return the columns [A] that the states of the tokens fed next are kept in.

        Args:
            kept: as in `feed`; the next column takes what nobody reads.
        """
        active = slice(0, self.active)
        return (self.position[active] + self._shift[active]).clamp_(max=kept + 1)

    def clear(self) -> tuple[Tensor, Tensor]:
        """Fill the slots of ended rows with the last active ones.

        Returns:
            Slots to copy from and slots to copy to, [N] int64 each, for what else slots hold.
        """
        remaining = self.active - self.ended
        targets = [slot for slot in range(remaining) if self.held[slot] is None]
        origins = [slot for slot in range(remaining, self.active) if self.held[slot] is not None]
        for origin, target in zip(origins, targets, strict=True):
            self.held[target], self.closing[target] = self.held[origin], self.closing[origin]
        del self.held[remaining:], self.closing[remaining:]
        self._host_position[targets] = self._host_position[origins]
        moves = torch.tensor([origins, targets], dtype=torch.int64).to(self._state.device)
        self._state[:, moves[1]] = self._state[:, moves[0]]
        return moves[0], moves[1]
