"""Points side by side share the visible GPUs out: each has its own while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_exp.config.problems import Problem
from rlhf_exp.distributed.devices import visible_devices
from rlhf_exp.distributed.place import cores
from rlhf_exp.multirun.points import Point


class Devices:
    """The visible GPUs, of which running points hold some; without any, nothing is shared out.

    Args:
        names: The visible GPUs.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._free = list(names)

    @classmethod
    def seen(cls) -> Devices:
        """Return those of this process."""
        return cls(visible_devices())

    def problem(self, points: Sequence[Point]) -> Problem | None:
        """Return what is wrong if a point needs more GPUs than there are."""
        most = max(point.config.distributed.processes for point in points)
        if not self.names or most <= len(self.names):
            return None
        return Problem(
            "distributed.processes",
            str(most),
            f"a point needs a GPU for each of its processes, and {len(self.names)} are visible "
            f"({', '.join(self.names)}); set it to at most {len(self.names)}.",
        )

    def side_by_side(self, processes: int) -> int:
        """Return how many points of so many processes fit on cores and GPUs; at least 1."""
        fitting = cores() // processes
        if self.names:
            fitting = min(fitting, len(self.names) // processes)
        return max(1, fitting)

    def take(self, processes: int) -> list[str] | None:
        """Return GPUs of its own for a point, one a process; `None` while too few are free."""
        if not self.names:
            return []
        if len(self._free) < processes:
            return None
        taken, self._free = self._free[:processes], self._free[processes:]
        return taken

    def give_back(self, names: Sequence[str]) -> None:
        """Take back what a point held that has ended."""
        free = {*self._free, *names}
        self._free = [name for name in self.names if name in free]
