"""A training task, as the trainer sees it: its iteration, its evaluation, its own state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_exp.distributed.world import World
from rlhf_exp.training.metrics import MetricAccumulator
from rlhf_exp.training.result import EvaluationResult

Update = Callable[[Iterable[Tensor]], None]
"""One optimizer step: adds up the gradients of the losses (each 0-dim) of its micro-batches."""


class Task(Protocol):
    """A stage's training task.

    Attributes:
        module: Holds every parameter that trains.
        updates: Optimizer steps of one iteration; training stops and resumes between iterations.
    """

    module: nn.Module

    @property
    def updates(self) -> int: ...  # noqa: D102

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper of `module`."""

    def iterate(self, iteration: int, update: Update) -> None:
        """Run iteration `iteration` (from 0): call `update` once for each optimizer step."""

    def metrics(self) -> dict[str, float]:
        """Return the means since the last call, over all processes."""

    def distributions(self) -> dict[str, list[float]]:
        """Return values over all processes of which histograms are to be shown, by name.

        Called after `metrics`, for the same time; every process calls it.
        """

    def evaluate(self) -> EvaluationResult:
        """Evaluate on validation data."""

    def state(self) -> dict[str, Any]:
        """Return what a resume needs beyond weights and step, as JSON values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state` back."""

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""


class SingleStepTask(ABC):
    """The part that SFT, reward model and DPO share: an iteration is one optimizer step.

    The order of rows is a function of the step, so a resume needs weights and step alone.

    Args:
        module: Holds every parameter that trains.
        world: The processes.
    """

    updates = 1

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module, self.world = module, world
        self.meters = MetricAccumulator(world)
        self._forward: Callable[..., Any] = module

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper."""
        self._forward = wrapped

    def iterate(self, iteration: int, update: Update) -> None:
        """Take one optimizer step on the next rows."""
        update(self._losses(iteration))

    @abstractmethod
    def _losses(self, step: int) -> Iterator[Tensor]:
        """Yield each micro-batch's part (0-dim) of the loss of optimizer step `step`."""

    def metrics(self) -> dict[str, float]:
        """Return the means since the last call, over all processes."""
        return self.meters.means()

    def distributions(self) -> dict[str, list[float]]:
        """Return none."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take nothing back."""
        assert not state, "such a task stores nothing"

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""
        loss = metrics["loss/total"]
        return None if math.isfinite(loss) else f"the loss is {loss}"
