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

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_exp.config.root import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.loop_types import Outcome
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.stages.context import MODEL, SNAPSHOTS, StageContext, snapshot_name
from rlhf_exp.stages.training import torch_dtype

log = logging.getLogger(__name__)

INDEX = "index.json"


def save_models(
    config: Config,
    context: StageContext,
    world: World,
    module: Policy | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    outcome: Outcome,
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
        world.together(lambda: module.save(folder, tokenizer) if world.is_main else None)

    write(context.folder / MODEL)
    folder = context.folder / SNAPSHOTS
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was cut off
    for step, path in sorted(outcome.kept.items()):
        if step == outcome.published_step:
            continue
        if not world.agreed(path.is_file()):
            log.warning("no snapshot of step %d: it was not yet asked for at that step", step)
            continue
        _put(module, load_file(path))
        prepare()
        write(folder / snapshot_name(step))
    if outcome.kept and world.is_main:
        _write_index(folder, outcome)


def _write_index(folder: Path, outcome: Outcome) -> None:
    steps = {"published": outcome.published_step, "best": outcome.best_step}
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({**steps, "last": outcome.last_step}))


@torch.no_grad()
def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, whatever its number format and whether or not they train now."""
    targets = dict(module.named_parameters())
    for name, value in weights.items():
        targets[name].copy_(value)
