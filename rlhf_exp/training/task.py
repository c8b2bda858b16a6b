"""What a stage brings to the shared loop: its rows, its loss, its evaluation, its own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_exp.errors import UserError


class Diverged(UserError):
    """Training was stopped because its numbers left the range in which they mean anything."""


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; a checkpoint holds all that was done."""


@dataclass(frozen=True)
class SampleTable:
    """Text samples of an evaluation."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: Scalars, named `eval/...`.
        objective: What `select: best` maximises.
        samples: A table to look at, if the stage makes one.
    """

    metrics: dict[str, float]
    objective: float
    samples: SampleTable | None = None


class Task(Protocol):
    """What a stage brings to the loop.

    Attributes:
        module: Holds every parameter that trains.
    """

    module: nn.Module

    def attach(self, wrapped: nn.Module) -> None:
        """Send forward passes with gradients through the strategy's wrapper of `module`."""

    def accumulate(self, step: int, backward: Callable[[Tensor], None]) -> None:
        """Compute the loss of optimizer step `step` and hand each micro-batch's to `backward`."""

    def at_boundary(self, step: int) -> bool:
        """Whether the run can stop and resume after `step` optimizer steps."""

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
