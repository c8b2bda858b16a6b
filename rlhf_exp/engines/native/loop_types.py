"""What the loop of a stage is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.kept import Keep
from rlhf_exp.engines.native.optim import OptimSettings
from rlhf_exp.tracking.tracker import Tracker


@dataclass(frozen=True)
class LoopSettings:
    """When the loop does what.

    Attributes:
        optim: Optimizer and schedule; `optim.steps` is the length of the run.
        eval_every: Optimizer steps between evaluations.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_checkpoints: Number of latest checkpoints kept.
        select_best: Whether the published weights are the best on validation, or the last.
        keep: Which other weights outlast training.
    """

    optim: OptimSettings
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    select_best: bool
    keep: Keep = field(default_factory=Keep)


@dataclass(frozen=True)
class LoopContext:
    """What the loop works with.

    Attributes:
        world: The processes.
        folder: The stage's staging folder.
        tracker: Opens the tracker at the step to resume from (`None`: from the start).
        on_step: Told the step and the latest metrics, for a progress display.
        before_write: Called before every checkpoint; raises if this process may no longer write.
        interrupted: Whether the user has asked to stop.
        given_up: Called in the main process after an evaluation with the step and the number of
            steps: whether a search gives the run up. `None`: there is no search.
        conclude: What is done with the trained module before the tracker is closed; returns further
            metrics. A run that was given up is not concluded.
    """

    world: World
    folder: Path
    tracker: Callable[[int | None], Tracker]
    on_step: Callable[[int, Mapping[str, float]], None]
    before_write: Callable[[], None]
    interrupted: Callable[[], bool]
    given_up: Callable[[int, int], bool] | None = None
    conclude: Callable[[Outcome, Tracker], Mapping[str, float]] = lambda outcome, tracker: {}


@dataclass(frozen=True)
class Outcome:
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
