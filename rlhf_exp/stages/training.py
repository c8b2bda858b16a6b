"""The native trainer, run with a stage's config, tracker and progress bar."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from torch import nn

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.distributed.world import World
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.publish import record_model
from rlhf_exp.stages.tracking import stage_progress, tracker_for
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.result import TrainingResult
from rlhf_exp.training.task import Task
from rlhf_exp.training.trainer import TrainingContext, train

log = logging.getLogger(__name__)


def keep_small_updates(module: nn.Module) -> None:
    """Hold the trainable parameters in float32, whatever the model's own number format.

    A bfloat16 weight has 8 bits: an update below its 256th part would be rounded away. Frozen
    parameters stay as they are, and mixed precision casts both to bfloat16 where they meet.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def run_loop(
    config: Config,
    section: TrainingConfig,
    steps: int,
    task: Task,
    world: World,
    context: StageContext,
    watch: tuple[str, ...],
    conclude: Callable[[TrainingResult], Mapping[str, float] | None],
    weights_everywhere: bool = False,
) -> TrainingResult:
    """Run the shared loop with the tracker and the progress bar of a stage.

    Args:
        config: The experiment.
        section: Config section of the stage.
        steps: Optimizer steps.
        task: The task to train.
        world: The processes.
        context: Context of the stage.
        watch: Metrics of the progress bar.
        conclude: Leaves the model in `context.folder`; may return further metrics.
        weights_everywhere: Whether it computes with the module, in every process.
    """
    if world.is_main:
        _warn_of_warmup(context.stage, section, steps)
    if context.probe is not None:
        context.probe.run(section, steps, task, world, context)

    def conclude_tracked(outcome: TrainingResult, tracker: Tracker) -> Mapping[str, float]:
        metrics = conclude(outcome) or {}
        record_model(context, world, outcome, tracker)
        return metrics

    with (
        stage_progress(context, context.stage, steps, world, watch) as progress,
        context.polite_interrupts() as interrupted,
    ):
        loop = TrainingContext(
            world=world,
            folder=context.folder,
            tracker=lambda resume: tracker_for(config, context, resume, world),
            on_start=progress.begin,
            on_step=progress.update,
            before_write=context.before_write,
            interrupted=interrupted,
            given_up=context.given_up,
            conclude=conclude_tracked,
            weights_everywhere=weights_everywhere,
        )
        return train(task, section, steps, loop)


def _warn_of_warmup(stage: str, section: TrainingConfig, steps: int) -> None:
    """Warn where training ends before its learning rate is reached, as with few rows it may."""
    if section.warmup_steps >= steps > 0:
        log.warning(
            "%s takes %d optimizer steps, all of them in its warm-up of %d: the learning rate "
            "never comes to %s.lr=%g, and little is learned; train longer, in smaller batches, or "
            "lower %s.warmup_steps",
            *(stage, steps, section.warmup_steps, stage, section.lr, stage),
        )


def steps_of(steps: int | None, epochs: float | None, rows: int, batch: int) -> int:
    """Return the number of optimizer steps that `steps` or `epochs` stands for."""
    if steps is not None:
        return steps
    assert epochs is not None, "checked with the config"
    return max(1, math.ceil(epochs * rows / batch))


def lora_of(section: TrainingConfig) -> LoraSettings | None:
    """Return the adapter asked for, if any."""
    lora = section.lora
    return LoraSettings(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def parameter_facts(module: nn.Module) -> dict[str, float | int | str]:
    """Return how many parameters there are and how many train."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trains in sizes if trains),
    }
