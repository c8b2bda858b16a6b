"""The trainer that all stages share: resume, iterate, log, evaluate, checkpoint, stop.

A task runs one iteration after another; the trainer takes its optimizer steps and does the rest
between iterations. A step is a function of its number and of what a checkpoint holds, so a run that
is killed and started again repeats the lost steps bit for bit (on a CPU, at the same number of
threads).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rlhf_exp.config.training import Select, TrainingConfig
from rlhf_exp.distributed.world import World
from rlhf_exp.tracking.tracker import Tracker, finishing
from rlhf_exp.training.checkpoint import Checkpoint, Checkpoints, Snapshots
from rlhf_exp.training.memory import memory_metrics, memory_phase
from rlhf_exp.training.optim import build_optimizer, set_lr
from rlhf_exp.training.result import Diverged, Interrupted, TrainingResult
from rlhf_exp.training.task import Task

log = logging.getLogger(__name__)


def train(
    task: Task, section: TrainingConfig, steps: int, context: TrainingContext
) -> TrainingResult:
    """Train to the last step, from the newest checkpoint if there is one.

    Args:
        task: What is trained.
        section: Of the stage: optimizer, schedule, intervals, which weights are published and kept.
        steps: Optimizer steps of the whole run, a multiple of `task.updates`.
        context: What the trainer works with.

    Raises:
        Diverged: A loss or gradient is not finite, or the task says so.
        Interrupted: The user asked to stop.
    """
    folder = context.folder / "checkpoints"
    checkpoints = Checkpoints(folder, section.keep_checkpoints, context.world)
    best, kept = (Snapshots(context.folder / name, context.world) for name in ("best", "kept"))

    def snapshots(state: Mapping[str, Any]) -> Iterator[Path]:
        """Yield the files that the rest of a run from this state reads."""
        progress = TrainingProgress.of(state, steps)
        if section.select == Select.best and progress.best_step is not None:
            yield best.path(progress.best_step)
        # Weights that were asked for after their step are not there, and nobody misses them.
        yield from filter(Path.exists, map(kept.path, progress.kept))

    checkpoint = checkpoints.latest(snapshots)
    resumed = None if checkpoint is None else checkpoint.step
    with finishing(context.tracker(resumed)) as tracker:
        trainer = _Trainer(task, section, steps, context, checkpoints, best, kept, tracker)
        start = trainer.begin(checkpoint)
        context.on_start(start)
        while trainer.progress.step < steps and not trainer.pruned:
            with memory_phase("updating", context.world.device):
                task.iterate(trainer.progress.step // task.updates, trainer.update)
            trainer.report()
            trainer.evaluate_if_due()
            trainer.snapshot_if_due()
            trainer.checkpoint_if_due()
            trainer.stop_if_interrupted()
        with memory_phase("checkpointing", context.world.device):
            result = trainer.finish(start)
            if result.pruned:
                return result
            more = context.conclude(result, tracker)
        if more:
            tracker.summary(more)
        return replace(result, metrics={**result.metrics, **more})


class _Trainer:
    def __init__(
        self,
        task: Task,
        section: TrainingConfig,
        steps: int,
        context: TrainingContext,
        checkpoints: Checkpoints,
        best: Snapshots,
        kept: Snapshots,
        tracker: Tracker,
    ) -> None:
        self.task, self.section, self.steps, self.context = task, section, steps, context
        self.checkpoints, self.tracker = checkpoints, tracker
        self.world = context.world
        self.progress, self.before = TrainingProgress(), TrainingProgress()
        build = partial(build_optimizer, task.module, section)
        task.attach(self.world.prepare(task.module, build, section.grad_norm))
        self.best, self.kept = best, kept
        self.latest: dict[str, float] = {}
        self.pruned = False
        self.select_best = section.select == Select.best

    def begin(self, checkpoint: Checkpoint | None) -> int:
        """Start from `checkpoint`, or afresh; return the number of steps already done."""
        if checkpoint is None:
            self.kept.prune([])
            self.evaluate_if_due()
            return 0
        self.world.resume(checkpoint.weights, checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng)
        torch.set_num_threads(checkpoint.state["threads"])
        self.task.load_state(checkpoint.state["task"])
        self.progress = TrainingProgress.of(checkpoint.state, self.steps)
        self.kept.prune(self.progress.kept)
        log.info("resumed at step %d", checkpoint.step)
        return checkpoint.step

    def update(self, losses: Iterable[Tensor]) -> None:
        """Do one optimizer step on the sum of the micro-batches' losses (each 0-dim)."""
        step = self.progress.step
        rate = set_lr(self.world.strategy.optimizer, self.section, step, self.steps)
        for loss in losses:
            self.world.backward(loss)
        norm = self.world.strategy.step()
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient norm at step {step} is {norm}")
        self.progress.step = step + 1
        self.latest |= {"optim/lr": rate, "optim/grad_norm": norm}
        self.context.on_step(self.progress.step, self.latest)

    def report(self) -> None:
        """Log what happened since the last report."""
        self.before = self.progress.copy()
        metrics = self.task.metrics() | memory_metrics(self.world.device)
        metrics |= {name: self.latest[name] for name in ("optim/lr", "optim/grad_norm")}
        self.latest |= metrics
        step = self.progress.step
        for name, values in self.task.distributions().items():
            self.tracker.histogram(name, values, step)
        self.tracker.log(metrics, step, more=self._evaluates())
        reason = self.task.check(metrics)
        if reason is not None:
            raise self._diverged(reason)

    def evaluate_if_due(self) -> None:
        """Evaluate at the start, at the end, and after the first iteration past each interval."""
        if not self._evaluates():
            return
        step = self.progress.step
        with memory_phase("evaluating", self.world.device):
            evaluation = self.task.evaluate()
        if evaluation.samples is not None:
            self.tracker.table(
                "eval/samples", evaluation.samples.columns, evaluation.samples.rows, step
            )
        self.tracker.log(evaluation.metrics, step)
        self.progress.last_eval = step
        self.latest |= evaluation.metrics
        best = self.progress.best_objective
        better = best is None or evaluation.objective > best
        if better or not self.select_best:
            self.progress.published_metrics = dict(evaluation.metrics)
        if better:
            self.progress.best_objective, self.progress.best_step = evaluation.objective, step
            if self.select_best or Select.best in self.section.keep:
                self._keep(self.best, step)
        self.pruned = self._given_up()

    def _given_up(self) -> bool:
        """Return whether a search gives the run up; the main process decides for all."""
        given_up, step, steps = self.context.given_up, self.progress.step, self.steps
        if given_up is None:
            return False
        return self.world.run_on_all(lambda: self.world.is_main and given_up(step, steps))[0]

    def _evaluates(self) -> bool:
        step, every = self.progress.step, self.section.eval_every
        return passes(step, self.progress.last_eval, every) or self._at_end()

    def _at_end(self) -> bool:
        return self.progress.step >= self.steps

    def snapshot_if_due(self) -> None:
        """Keep the weights after the first iteration past each interval, and at the end."""
        step, every = self.progress.step, self.section.keep_every
        before = max(self.progress.kept, default=0)
        due = every is not None and passes(step, before, every)
        if due or (Select.last in self.section.keep and self._at_end()):
            self._keep(self.kept, step)
            self.progress.kept.append(step)

    def _keep(self, snapshots: Snapshots, step: int) -> None:
        with memory_phase("checkpointing", self.world.device):
            snapshots.save(step, self.context.before_write)

    def checkpoint_if_due(self, force: bool = False) -> None:
        """Save a checkpoint after the first iteration past each interval, and at the end."""
        step, every = self.progress.step, self.section.checkpoint_every
        due = passes(step, self.progress.last_checkpoint, every)
        due = due or force or self._at_end()
        if not due or self.progress.last_checkpoint == step:
            return
        self.progress.last_checkpoint = step
        self._note_best()
        extended_state = self._extended_state() if self._at_end() else None
        state = self.progress.state(extended_state) | {"task": self.task.state()}
        with memory_phase("checkpointing", self.world.device):
            self.checkpoints.save(step, state, self.context.before_write)
        further = (
            []
            if extended_state is None or extended_state.best_step is None
            else [extended_state.best_step]
        )
        self.best.prune([*self.progress.best_of_checkpoints, *further])

    def _extended_state(self) -> TrainingProgress:
        section = self.section
        return self.progress.extended_state(self.before, section.eval_every, section.keep_every)

    def _note_best(self) -> None:
        """Record which best weights the kept checkpoints, this one included, speak of."""
        if self.progress.best_step is not None:
            kept = [*self.progress.best_of_checkpoints, self.progress.best_step]
            self.progress.best_of_checkpoints = kept[-self.section.keep_checkpoints :]

    def stop_if_interrupted(self) -> None:
        """Save and leave if the user pressed Ctrl-C."""
        if not self._at_end() and self.world.any(self.context.interrupted()):
            self.checkpoint_if_due(force=True)
            raise Interrupted(f"stopped at step {self.progress.step}; a checkpoint was saved")

    def finish(self, start: int) -> TrainingResult:
        """Put the weights to publish into the module, which is whole and plain from now on."""
        progress = self.progress
        published, best = progress.step, None
        if self.select_best and progress.best_step is not None:
            published = progress.best_step
            best = self.best.load(published)
        self.world.release(best, self.context.weights_everywhere)
        self.task.attach(self.task.module)
        objective = progress.best_objective
        metrics = self.progress.published_metrics | {"published_step": float(published)}
        metrics |= {} if objective is None else {"best_objective": objective}
        self.tracker.summary(metrics)
        kept = {step: self.kept.checked_path(step) for step in progress.kept}
        if Select.best in self.section.keep and progress.best_step is not None:
            kept[progress.best_step] = self.best.checked_path(progress.best_step)
        return TrainingResult(
            metrics,
            objective,
            self.tracker.run_id,
            published_step=published,
            steps_run=progress.step - start,
            last_step=progress.step,
            best_step=progress.best_step,
            kept=kept,
            pruned=self.pruned,
        )

    def _diverged(self, what: str) -> Diverged:
        """Raise the alarm; return what to raise."""
        text = (
            f"training stopped: {what}. The last good checkpoint is in {self.checkpoints.folder}. "
            "Try a lower learning rate, a longer warm-up or, for PPO, a larger ppo.kl.coef"
        )
        self.tracker.alert("Training has diverged", text, self.progress.step)
        return Diverged(text)


@dataclass(frozen=True)
class TrainingContext:
    """What the trainer works with.

    Attributes:
        world: The processes.
        folder: The stage's staging folder.
        tracker: Opens the tracker at the step to resume from (`None`: from the start).
        on_step: Told the step and the latest metrics, for a progress display.
        on_start: Told the step that training begins at, before the first one.
        before_write: Called before every checkpoint; raises if this process may no longer write.
        interrupted: Whether the user has asked to stop.
        given_up: Called in the main process after an evaluation with the step and the number of
            steps: whether a search gives the run up. `None`: there is no search.
        conclude: What is done with the trained module before the tracker is closed; returns further
            metrics. A run that was given up is not concluded.
        weights_everywhere: Whether that needs the weights in every process; else in the main one.
    """

    world: World
    folder: Path
    tracker: Callable[[int | None], Tracker]
    on_step: Callable[[int, Mapping[str, float]], None]
    before_write: Callable[[], None]
    interrupted: Callable[[], bool]
    on_start: Callable[[int], None] = lambda step: None
    given_up: Callable[[int, int], bool] | None = None
    conclude: Callable[[TrainingResult, Tracker], Mapping[str, float]] = lambda outcome, tracker: {}
    weights_everywhere: bool = True


_EXTENDED = "going_on"
_OF_EVALUATIONS = ("last_eval", "best_step", "best_objective", "published_metrics")


def passes(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies after step `before`, up to `step`."""
    return step // every > before // every


@dataclass
class TrainingProgress:
    """How far training has come: the trainer's own state in a checkpoint.

    Attributes:
        step: Optimizer steps done.
        last_eval: Step of the last evaluation; -1: none yet.
        last_checkpoint: Step of the last checkpoint.
        best_step: Step of the best weights on validation so far.
        best_objective: Their objective.
        best_of_checkpoints: `best_step` of each checkpoint that is kept.
        published_metrics: Evaluation of the weights that would be published.
        kept: Steps whose weights are kept as snapshots.
    """

    step: int = 0
    last_eval: int = -1
    last_checkpoint: int = 0
    best_step: int | None = None
    best_objective: float | None = None
    best_of_checkpoints: list[int] = field(default_factory=list)
    published_metrics: dict[str, float] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def copy(self) -> TrainingProgress:
        """Return a copy that later changes do not reach."""
        return TrainingProgress(**asdict(self))

    def extended_state(
        self, before: TrainingProgress, eval_every: int, keep_every: int | None
    ) -> TrainingProgress:
        """Return the state at the end of a run as it would be in a longer run.

        The end of training is evaluated, and its weights may be kept, although no interval has
        passed: a longer run would have done neither.

        Args:
            before: The state when the last step was done, and nothing after it.
            eval_every: Optimizer steps between evaluations.
            keep_every: Between weights that are kept; `None`: none are.
        """
        undo: dict[str, Any] = {}
        if not passes(self.step, before.last_eval, eval_every):
            undo |= {name: getattr(before, name) for name in _OF_EVALUATIONS}
        kept_before = max(before.kept, default=0)
        if keep_every is None or not passes(self.step, kept_before, keep_every):
            undo["kept"] = before.kept
        return replace(self, **undo)

    def state(self, extended_state: TrainingProgress | None) -> dict[str, Any]:
        """Return JSON values for a checkpoint; `extended_state` is given at the end of training."""
        more = {} if extended_state is None else {_EXTENDED: asdict(extended_state)}
        return {"loop": asdict(self)} | more

    @classmethod
    def of(cls, state: Mapping[str, Any], steps: int) -> Self:
        """Return the progress in the state of a checkpoint.

        Args:
            state: Of the checkpoint.
            steps: Of the run that resumes: if it is longer than the run that the checkpoint ended,
                its progress is as if that run had never ended.
        """
        extended = _EXTENDED in state and state["step"] < steps
        return cls(**state[_EXTENDED if extended else "loop"])
