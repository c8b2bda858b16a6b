"""What a stage brings to the trainer: its iteration, its loss, its evaluation, its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_exp.training.result import Evaluation

Update = Callable[[Iterable[Tensor]], None]
"""One optimizer step: adds up the gradients of the losses (each 0-dim) of its micro-batches."""


class Task(Protocol):
    """What a stage brings to the trainer.

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

    def evaluate(self) -> Evaluation:
        """Evaluate on validation data."""

    def state(self) -> dict[str, Any]:
        """Return what a resume needs beyond weights and step, as JSON values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state` back."""

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return why training must stop, or `None`."""
