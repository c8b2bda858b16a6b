"""The models that a training stage leaves: the published one, and snapshots of other steps.

Snapshots are there because they are asked for. `snapshots/step-N/` is a folder like `model/`, and
`snapshots/index.json` says which steps were published (`model/` has these), the best and the last.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_exp.config.experiment import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import MODEL, SNAPSHOTS, StageContext, snapshot_name
from rlhf_exp.stages.setup import torch_dtype
from rlhf_exp.stages.tracking import lineage
from rlhf_exp.store.atomic_files import disk_full_is_user_error
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.sealed import file_digest
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.training.result import TrainingResult

if TYPE_CHECKING:
    from rlhf_exp.models.reward_model import RewardModel

log = logging.getLogger(__name__)

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
        context: Context of the stage.
        world: The processes.
        module: The trained module, with the weights to be published.
        tokenizer: Written with each model.
        outcome: Result of the training.
        prepare: Called in every process before a snapshot is written, with its weights in `module`.
    """
    plain: nn.Module = module.model if isinstance(module, Policy) else module.trunk
    plain.to(dtype=torch_dtype(config))

    needed = sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
    remedy = "Make room and run again: it goes on from the last checkpoint."

    def write(folder: Path) -> None:
        work = f"saving the model of {context.stage} {context.key}"
        with disk_full_is_user_error(folder, work, needed, remedy):
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
    """Copy weights into a module, whatever its number format and whether or not they train now.

    A module without weights, of a process that does not write it, is left as it is.
    """
    targets = dict(module.named_parameters())
    for name, value in weights.items():
        if not targets[name].is_meta:
            targets[name].copy_(value)


def record_model(
    context: StageContext, world: World, outcome: TrainingResult, tracker: Tracker
) -> None:
    """Tell the tracker of the model in the staging folder, at the place that it will have."""
    if not world.is_main:
        return
    model = context.folder / MODEL
    facts = lineage(context) | {
        "digest": _digest_of_weights(context.folder),
        "published_step": outcome.published_step,
        "metrics": outcome.metrics,
    }
    place = context.folder.parents[1] / context.stage / context.key / MODEL
    tracker.model(f"{context.stage}-{context.key}", model, place, facts)


def _digest_of_weights(folder: Path) -> str:
    """Return the digest by which later stages name these weights (see `weights_digest`)."""
    weights = (folder / MODEL).rglob("*.safetensors")
    return key_of({path.relative_to(folder).as_posix(): file_digest(path) for path in weights})
