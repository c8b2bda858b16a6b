"""What the three training stages share: from config sections to the engine's flat settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_exp.config.model import Dtype
from rlhf_exp.config.root import Config
from rlhf_exp.config.training import Select, TrainingConfig
from rlhf_exp.distributed.world import Precision, World, world_of
from rlhf_exp.engines.native.kept import Keep
from rlhf_exp.engines.native.loop import train
from rlhf_exp.engines.native.loop_types import LoopContext, LoopSettings, Outcome
from rlhf_exp.engines.native.optim import OptimSettings
from rlhf_exp.engines.native.task import Task
from rlhf_exp.models.load import Attention, load_causal_lm
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.probing import probe_loop
from rlhf_exp.stages.tracking import record_model, tracker_for
from rlhf_exp.tracking.progress import Progress
from rlhf_exp.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@contextmanager
def world_for(config: Config) -> Iterator[World]:
    """Open the processes that the config asks for."""
    section = config.distributed
    half = Dtype.bfloat16 in (section.precision, config.model.dtype)
    precision: Precision = "bfloat16" if half else "float32"
    strategy = section.strategy.value
    with world_of(precision, section.threads, strategy, section.offload) as world:
        yield world


def keep_small_updates(module: nn.Module) -> None:
    """Hold what trains in float32, whatever the model's own number format.

    A bfloat16 weight has 8 bits: an update below its 256th part would be rounded away. What is
    frozen stays as it is, and mixed precision casts both to bfloat16 where they meet.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def torch_dtype(config: Config) -> torch.dtype:
    """Return the number format that weights are stored in."""
    return torch.bfloat16 if config.model.dtype == Dtype.bfloat16 else torch.float32


def attention_of(config: Config) -> Attention:
    """Return the attention implementation."""
    name: Any = config.model.attention.value
    return name


def load_policy_model(config: Config, path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model in the config's number format."""
    return load_causal_lm(path, revision, torch_dtype(config), attention_of(config))


def run_loop(
    config: Config,
    section: TrainingConfig,
    steps: int,
    task: Task,
    world: World,
    context: StageContext,
    watch: tuple[str, ...],
    conclude: Callable[[Outcome], Mapping[str, float] | None],
) -> Outcome:
    """Run the shared loop with the tracker and the progress bar of a stage.

    Args:
        config: The experiment.
        section: Of the stage.
        steps: Optimizer steps.
        task: What is trained.
        world: The processes.
        context: Of the stage.
        watch: Metrics of the progress bar.
        conclude: Leaves the model in `context.folder`; may return further metrics.
    """
    settings = LoopSettings(
        optim=optim_settings(section, steps),
        eval_every=section.eval_every,
        checkpoint_every=section.checkpoint_every,
        keep_checkpoints=section.keep_checkpoints,
        select_best=section.select == Select.best,
        keep=Keep(section.keep_every, Select.best in section.keep, Select.last in section.keep),
    )
    if world.is_main:
        _warn_of_warmup(context.stage, section, steps)
    if context.probe is not None:
        probe_loop(settings, task, world, context, context.probe)

    def conclude_tracked(outcome: Outcome, tracker: Tracker) -> Mapping[str, float]:
        found = conclude(outcome) or {}
        record_model(context, world, outcome, tracker)
        return found

    with (
        Progress(context.stage, steps, watch, shown=world.is_main) as progress,
        context.polite_interrupts() as interrupted,
    ):
        loop = LoopContext(
            world=world,
            folder=context.folder,
            tracker=lambda resume: tracker_for(config, context, resume, world),
            on_step=progress.update,
            before_write=context.before_write,
            interrupted=interrupted,
            given_up=context.given_up,
            conclude=conclude_tracked,
        )
        return train(task, settings, loop)


def _warn_of_warmup(stage: str, section: TrainingConfig, steps: int) -> None:
    """Warn where training ends before its learning rate is reached, as with few rows it may."""
    if section.warmup_steps >= steps > 0:
        log.warning(
            "%s takes %d optimizer steps, all of them in its warm-up of %d: the learning rate "
            "never comes to %s.lr=%g, and little is learned; train longer, in smaller batches, or "
            "lower %s.warmup_steps",
            *(stage, steps, section.warmup_steps, stage, section.lr, stage),
        )


def optim_settings(section: TrainingConfig, steps: int) -> OptimSettings:
    """Return the optimizer and the schedule of a stage that takes so many steps."""
    return OptimSettings(
        lr=section.lr,
        schedule=section.schedule.value,
        warmup_steps=section.warmup_steps,
        steps=steps,
        betas=(section.betas[0], section.betas[1]),
        weight_decay=section.weight_decay,
        grad_norm=section.grad_norm,
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
