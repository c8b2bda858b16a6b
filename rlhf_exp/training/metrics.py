"""Sums over micro-batches and processes, turned into means once per report."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.batch import to_device
from rlhf_exp.distributed.world import World


class MetricAccumulator:
    """Numerators and denominators by name, on the device until they are read.

    Reading is the only point where the host waits for the device and processes for each other. All
    processes add the same names.

    Args:
        world: The processes to add up over.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._extremes: dict[str, tuple[Tensor, bool]] = {}
        self._spreads: dict[str, Tensor] = {}
        self._values: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add `total` over `count` items to the mean called `name`."""
        pair = torch.stack([self._number(total), self._number(count)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def spread(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Report the standard deviation of `values` [B] with `weights` [B] as `name`."""
        values, weights = values.detach().double(), weights.double()
        sums = [weights.sum(), (values * weights).sum(), (values.square() * weights).sum()]
        self._spreads[name] = torch.stack(sums)

    def extreme(self, name: str, value: Tensor, largest: bool) -> None:
        """Report the largest or smallest `value` (0-dim) seen as `name`."""
        value = self._number(value)
        if name in self._extremes:
            pick = torch.maximum if largest else torch.minimum
            value = pick(self._extremes[name][0], value)
        self._extremes[name] = (value, largest)

    def keep(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Keep the `values` [B] of rows with `weights` [B] above 0, for `distributions`."""
        self._values[name] = values.detach(), weights

    def distributions(self) -> dict[str, list[float]]:
        """Return what was kept, over all processes, and forget it."""
        found = {}
        for name, (values, weights) in sorted(self._values.items()):
            everyone = self._world.gather(values.float()).cpu()
            counts = self._world.gather(weights.float()).cpu() > 0
            found[name] = everyone[counts].tolist()
        self._values = {}
        return found

    def means(self) -> dict[str, float]:
        """Return everything over all processes, and start afresh."""
        found: dict[str, float] = {}
        for name, pair in self._reduced(self._sums).items():
            total, count = pair.tolist()
            found[name] = total / count if count else float("nan")
        for name, sums in self._reduced(self._spreads).items():
            count, total, squares = sums.tolist()
            mean = total / count
            found[name] = max(squares / count - mean * mean, 0.0) ** 0.5
        found |= self._reduced_extremes()
        self._sums, self._extremes, self._spreads = {}, {}, {}
        return found

    def _reduced(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not tensors:
            return {}
        names = sorted(tensors)
        totals = self._world.sum(torch.stack([tensors[name] for name in names])).cpu()
        return dict(zip(names, totals, strict=True))

    def _reduced_extremes(self) -> dict[str, float]:
        if not self._extremes:
            return {}
        extremes = sorted(self._extremes.items())
        own = torch.stack([value for _, (value, _) in extremes])
        everyone = self._world.gather(own[None]).cpu()
        return {
            name: float(values.max() if largest else values.min())
            for (name, (_, largest)), values in zip(extremes, everyone.unbind(1), strict=True)
        }

    def _number(self, value: Tensor | float) -> Tensor:
        device = self._world.device
        if isinstance(value, Tensor):
            return to_device(value.detach(), device).double()
        return torch.full((), value, dtype=torch.float64, device=device)  # not copied to a GPU
