"""What every conversation with a worker of another interpreter has: its loop, and its outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf_exp.config.training import Select
from rlhf_exp.engines.process import EngineProcess
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.result import Diverged, TrainingResult


class WeightSelection:
    """Which weights a run publishes, by the evaluations so far.

    Attributes:
        step: The last step that is known of.
        pruned: Whether a search has given the run up.
    """

    def __init__(self, select: Select, steps: int) -> None:
        self.select, self.steps = select, steps
        self.step, self.pruned = 0, False
        self._best: tuple[float, int] | None = None
        self._published: dict[str, float] = {}
        self._saved = 0

    def takes(self, metrics: dict[str, float], score: float, step: int) -> bool:
        """Return whether the weights of an evaluation are to be saved: they may be published."""
        self.step = step
        better = self._best is None or score > self._best[0]
        if better:
            self._best = (score, step)
        select_best = self.select is Select.best
        takes = better if select_best else True
        if takes:
            self._published, self._saved = metrics, step
        return takes and (select_best or step >= self.steps)

    def outcome(self, tracker: Tracker) -> TrainingResult:
        """Return the result of the run."""
        assert self._best is not None, "a run begins with an evaluation"
        objective, best = self._best
        metrics = self._published | {"published_step": float(self._saved)}
        metrics["best_objective"] = objective
        tracker.summary(metrics)
        return TrainingResult(
            metrics,
            objective,
            tracker.run_id,
            published_step=self._saved,
            steps_run=self.step,
            last_step=self.step,
            best_step=best,
            pruned=self.pruned,
        )


def converse(
    process: EngineProcess, plan: Path, handlers: Mapping[str, Callable[..., None]]
) -> None:
    """Let a worker carry out its plan, and answer it until it is done.

    Args:
        process: The worker, greeted.
        plan: The file that it reads.
        handlers: Called by the kind of a message, with its other fields.

    Raises:
        UserError: The worker has failed.
    """
    process.send(plan=str(plan))
    while (message := process.receive())["kind"] != "done":
        handlers[message.pop("kind")](**message)


def check_loss(loss: float, step: int, tracker: Tracker, remedy: str) -> None:
    """Raise `Diverged` if an optimizer step's loss is not finite."""
    if not math.isfinite(loss):
        text = f"training stopped: the loss at step {step} is {loss}. {remedy}"
        tracker.alert("Training has diverged", text, step)
        raise Diverged(text)
