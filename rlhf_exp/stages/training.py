"""What the three training stages share: from config sections to the engine's flat settings.

A few iterations of a stage, as it is configured, to see what all of them would take.

The models that a training stage leaves: the published one, and snapshots of other steps.

Snapshots are there because they are asked for. `snapshots/step-N/` is a folder like `model/`, and
`snapshots/index.json` says which steps were published (`model/` has these), the best and the last.

What the stages tell their trackers: who they are, what from, and what they have made.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_exp
from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config, Dtype
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.distributed.world import Precision, World, world_of
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import Attention, load_causal_lm
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages.context import MODEL, SNAPSHOTS, StageContext, snapshot_name
from rlhf_exp.store.artifact import git_state
from rlhf_exp.store.fingerprint import file_digest, key_of
from rlhf_exp.tracking.alerts import AlertRules
from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.progress_bar import StageProgress
from rlhf_exp.tracking.tracker import NullTracker, Tracker
from rlhf_exp.training.memory import ITERATIONS, ProbeFinished, Recorder
from rlhf_exp.training.task import Task
from rlhf_exp.training.trainer import TrainingContext, TrainingResult, train

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
    conclude: Callable[[TrainingResult], Mapping[str, float] | None],
) -> TrainingResult:
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
    if world.is_main:
        _warn_of_warmup(context.stage, section, steps)
    if context.probe is not None:
        probe_loop(section, steps, task, world, context, context.probe)

    def conclude_tracked(outcome: TrainingResult, tracker: Tracker) -> Mapping[str, float]:
        found = conclude(outcome) or {}
        record_model(context, world, outcome, tracker)
        return found

    with (
        StageProgress(context.stage, steps, watch, shown=world.is_main) as progress,
        context.polite_interrupts() as interrupted,
    ):
        loop = TrainingContext(
            world=world,
            folder=context.folder,
            tracker=lambda resume: tracker_for(config, context, resume, world),
            on_step=progress.update,
            before_write=context.before_write,
            interrupted=interrupted,
            given_up=context.given_up,
            conclude=conclude_tracked,
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


def probe_loop(
    section: TrainingConfig,
    steps: int,
    task: Task,
    world: World,
    context: StageContext,
    recorder: Recorder,
) -> NoReturn:
    """Evaluate, train a few iterations, evaluate, write a checkpoint, make the module whole.

    Raises:
        Probed: Always, with `steps` (optimizer steps of the whole stage), `iterations`,
            `evaluations` and `checkpoints` (how many the whole stage has) and `processes` (what
            `Recorder.to_json` returns in each of them, by rank).
    """
    ends = list(range(task.updates, steps + 1, task.updates))
    last = ends[: ITERATIONS[context.stage]][-1]
    # The schedule's end comes earlier than in the whole stage; that costs nothing.
    short = replace(section, eval_every=last, checkpoint_every=last, keep_every=None, keep=[])
    with (
        StageProgress(f"{context.stage} (probe)", last, (), shown=world.is_main) as progress,
        context.polite_interrupts() as interrupted,
    ):
        loop = TrainingContext(
            world=world,
            folder=context.folder,
            tracker=lambda resume: recorder,
            on_step=progress.update,
            before_write=context.before_write,
            interrupted=interrupted,
        )
        recorder.begin()
        train(task, short, last, loop)
    raise ProbeFinished(
        {
            "steps": steps,
            "iterations": len(ends),
            "evaluations": 1 + _due(ends, section.eval_every),
            "checkpoints": _due(ends, section.checkpoint_every),
            "processes": world.all_gather_object(recorder.to_json()),
        }
    )


def _due(ends: list[int], every: int) -> int:
    """Return at how many of these steps something is due that is so `every` steps and at last."""
    passed = sum(step // every > before // every for before, step in pairwise([0, *ends]))
    return passed + (ends[-1] // every == ([0, *ends][-2]) // every)


INDEX = "index.json"


def save_models(
    config: Config,
    context: StageContext,
    world: World,
    module: Policy | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    outcome: TrainingResult,
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Let the main process write the stage's model, and the snapshots asked for.

    Undoes `keep_small_updates`. A failure is every process's.

    Args:
        config: The experiment.
        context: Of the stage.
        world: The processes.
        module: What trained, with the weights to be published.
        tokenizer: Written with each model.
        outcome: Of the training.
        prepare: Called in every process before a snapshot is written, with its weights in `module`.
    """
    plain: nn.Module = module.model if isinstance(module, Policy) else module.trunk
    plain.to(dtype=torch_dtype(config))

    def write(folder: Path) -> None:
        world.run_on_all(lambda: module.save(folder, tokenizer) if world.is_main else None)

    write(context.folder / MODEL)
    folder = context.folder / SNAPSHOTS
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was cut off
    for step, path in sorted(outcome.kept.items()):
        if step == outcome.published_step:
            continue
        if not world.broadcast_object(path.is_file()):
            log.warning("no snapshot of step %d: it was not yet asked for at that step", step)
            continue
        _put(module, load_file(path))
        prepare()
        write(folder / snapshot_name(step))
    if outcome.kept and world.is_main:
        _write_index(folder, outcome)


def _write_index(folder: Path, outcome: TrainingResult) -> None:
    steps = {"published": outcome.published_step, "best": outcome.best_step}
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({**steps, "last": outcome.last_step}))


@torch.no_grad()
def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, whatever its number format and whether or not they train now."""
    targets = dict(module.named_parameters())
    for name, value in weights.items():
        targets[name].copy_(value)


def tracker_for(config: Config, context: StageContext, resume: int | None, world: World) -> Tracker:
    """Open the stage's tracker; lineage and revision go into its config: that works offline too."""
    if not world.is_main:
        return NullTracker()
    section = config.tracking
    git = git_state(Path(rlhf_exp.__path__[0]).parent)
    diff = str(git.pop("diff", ""))
    return open_tracker(
        section.mode.value,
        context.folder,
        project=section.project,
        entity=section.entity,
        group=config.name,
        job_type=context.stage,
        name=f"{context.stage}-{context.key[:8]}",
        tags=section.tags,
        config=to_dict(config) | {"lineage": _lineage(context), "git": git},
        diff=diff,
        alerts=_alert_rules(config),
        resume_step=resume,
    )


def record_model(
    context: StageContext, world: World, outcome: TrainingResult, tracker: Tracker
) -> None:
    """Tell the tracker of the model in the staging folder, at the place that it will have."""
    if not world.is_main:
        return
    made = context.folder / MODEL
    facts = _lineage(context) | {
        "digest": _digest_of_weights(context.folder),
        "published_step": outcome.published_step,
        "metrics": outcome.metrics,
    }
    place = context.folder.parents[1] / context.stage / context.key / MODEL
    tracker.model(f"{context.stage}-{context.key}", made, place, facts)


def _lineage(context: StageContext) -> dict[str, object]:
    return {
        "stage": context.stage,
        "key": context.key,
        "parents": dict(context.parents),
        "inputs": dict(context.inputs),
    }


def _digest_of_weights(folder: Path) -> str:
    """Return what the children of the model will call its digest (see `weights_digest`)."""
    found = (folder / MODEL).rglob("*.safetensors")
    return key_of({path.relative_to(folder).as_posix(): file_digest(path) for path in found})


def _alert_rules(config: Config) -> AlertRules:
    rules, target = config.tracking.alerts, config.ppo.kl.target
    kl = None if rules.kl_factor is None or target is None else rules.kl_factor * target
    return AlertRules(kl=kl, reward_drop=rules.reward_drop, entropy=rules.entropy_fraction)
