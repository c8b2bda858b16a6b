"""Results of training and of an evaluation, and the errors that end training early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
class EvaluationResult:
    """The result of an evaluation during training.

    Attributes:
        metrics: Scalars, named `eval/...`.
        objective: Maximised by `select: best`.
        samples: A table to look at, if the stage makes one.
    """

    metrics: dict[str, float]
    objective: float
    samples: SampleTable | None = None


@dataclass(frozen=True)
class TrainingResult:
    """How training ended.

    Attributes:
        metrics: The evaluation of the published weights, with their step and the best objective.
        objective: The best objective on validation data.
        run_id: The tracked run.
        published_step: Optimizer steps behind the weights now in the module.
        steps_run: Optimizer steps done by this process (fewer than all after a resume).
        last_step: Optimizer steps done in all.
        best_step: Optimizer steps behind the best weights on validation.
        kept: Files of the trainable weights of other steps that are asked for, by step.
        pruned: Whether a search gave the run up before its last step.
    """

    metrics: dict[str, float]
    objective: float | None
    run_id: str
    published_step: int
    steps_run: int
    last_step: int
    best_step: int | None
    kept: Mapping[int, Path] = field(default_factory=dict)
    pruned: bool = False
