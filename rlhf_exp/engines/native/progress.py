"""How far training has come: the loop's own state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

_GOING_ON = "going_on"
_OF_EVALUATIONS = ("last_eval", "best_step", "best_objective", "published_metrics")


def passes(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies after step `before`, up to `step`."""
    return step // every > before // every


@dataclass
class Progress:
    """The state.

    Attributes:
        step: Optimizer steps done.
        last_eval: Step of the last evaluation; -1: none yet.
        last_checkpoint: Step of the last checkpoint.
        best_step: Step of the best weights on validation so far.
        best_objective: What they reached.
        best_of_checkpoints: The best steps that the checkpoints which are kept speak of.
        published_metrics: Evaluation of the weights that would be published.
        kept: Steps whose weights are kept.
    """

    step: int = 0
    last_eval: int = -1
    last_checkpoint: int = 0
    best_step: int | None = None
    best_objective: float | None = None
    best_of_checkpoints: list[int] = field(default_factory=list)
    published_metrics: dict[str, float] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def copy(self) -> Progress:
        """Return a copy that later changes do not reach."""
        return Progress(**asdict(self))

    def going_on(self, before: Progress, eval_every: int, keep_every: int | None) -> Progress:
        """Return the state at the end of a run as it would be if the run went on.

        The end of training is evaluated, and its weights may be kept, although no interval has
        passed: a longer run would have done neither.

        Args:
            before: The state when the last step was done, and nothing after it.
            eval_every: Optimizer steps between evaluations.
            keep_every: Between weights that are kept; `None`: none are.
        """
        undone: dict[str, Any] = {}
        if not passes(self.step, before.last_eval, eval_every):
            undone |= {name: getattr(before, name) for name in _OF_EVALUATIONS}
        kept_before = max(before.kept, default=0)
        if keep_every is None or not passes(self.step, kept_before, keep_every):
            undone["kept"] = before.kept
        return replace(self, **undone)

    def state(self, going_on: Progress | None) -> dict[str, Any]:
        """Return JSON values for a checkpoint; `going_on` is given at the end of training."""
        more = {} if going_on is None else {_GOING_ON: asdict(going_on)}
        return {"loop": asdict(self)} | more

    @classmethod
    def of(cls, state: Mapping[str, Any], steps: int) -> Self:
        """Return what `state` was made of.

        Args:
            state: Of a checkpoint.
            steps: Of the run that goes on from there: where it is longer than the one that the
                checkpoint ended, it is as if that one had never ended.
        """
        extended = _GOING_ON in state and state["step"] < steps
        return cls(**state[_GOING_ON if extended else "loop"])
