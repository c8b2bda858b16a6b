"""Memory that ran out, as an error of the user's: the phase, the numbers, and what helps.

No stage imports this module; the process that runs a stage runs it inside of `explained`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.experiment import UNTRAINED, Config, Dtype, StrategyName
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.errors import UserError
from rlhf_exp.training.memory import OutOfMemory, Phase, memory_phase

_WORDS: dict[Phase, str] = {
    "loading": "it loaded models and spread them over the processes",
    "sampling": "it sampled responses",
    "scoring": "responses were scored",
    "assessing": "policy and reference read the sampled responses",
    "updating": "it computed gradients and updated the weights",
    "evaluating": "it evaluated",
    "checkpointing": "it saved weights and optimizer state",
}
_SHARDED = (StrategyName.zero3, StrategyName.fsdp)


@contextmanager
def explained(config: Config, stage: str) -> Iterator[None]:
    """Turn memory that runs out while a stage runs into a `UserError`.

    Args:
        config: The experiment.
        stage: Name of the stage.

    Raises:
        UserError: Memory ran out; with the phase, the device's memory and overrides that help.
    """
    try:
        with memory_phase("evaluating" if stage in UNTRAINED else "loading", _device()):
            yield
    except OutOfMemory as error:
        found = remedies(config, stage, error)
        first = f"First try {found[0]}. " if found else ""
        then = f"If that is not enough: {', '.join(found[1:])}. " if found[1:] else ""
        raise UserError(
            f"{stage}: {_place(error.device)} ran out of memory while {_WORDS[error.phase]}; "
            f"{error.usage} ({error}). {first}{then}plan=true estimates what fits, and probe=true "
            "measures it"
        ) from error


def remedies(config: Config, stage: str, error: OutOfMemory) -> list[str]:
    """Return the overrides that make room in a phase, the most helpful first.

    All keep the results, up to rounding: none is in a key, so a run goes on from its checkpoint.
    Where one does not, as ZeRO's checkpoints are for ZeRO alone, it says so.
    """
    if error.device.type != _device().type:
        return _of_host_memory(config)
    if error.phase == "updating":
        return [*_smaller_updates(config, stage), *_spread(config)]
    found = [] if error.phase in ("loading", "checkpointing") else _fewer_rows(config, stage)
    if stage == "ppo" and error.phase in ("loading", "scoring"):
        found += _reward_elsewhere(config)
    return [*found, *_spread(config)]


def _fewer_rows(config: Config, stage: str) -> list[str]:
    """Return an override that halves the rows of a pass without gradients."""
    if stage == "eval":
        return _half("eval.batch", config.eval.batch)
    if stage in ("sft", "reward"):
        return _smaller_updates(config, stage)[:1]
    source = "dpo" if stage == "dpo" else "ppo"
    return _half(f"{source}.generation.batch", getattr(config, source).generation.batch)


def _smaller_updates(config: Config, stage: str) -> list[str]:
    """Return overrides by which a backward pass keeps less."""
    section: TrainingConfig = getattr(config, stage)
    share = -(-section.batch // config.distributed.processes)
    found = _half(f"{stage}.micro_batch", min(section.micro_batch or share, share))
    if not section.gradient_checkpointing:
        found.append(f"{stage}.gradient_checkpointing=true")
    return found


def _half(key: str, rows: int) -> list[str]:
    return [f"{key}={-(-rows // 2)} (now {rows})"] if rows > 1 else []


def _reward_elsewhere(config: Config) -> list[str]:
    """Return an override that takes the reward model off the devices that train."""
    reward = config.ppo.reward
    if reward.device is not None or reward.terms or not reward.model_scores:
        return []
    training, gpus = config.distributed.processes, torch.cuda.device_count()
    if training == 1 and not gpus:
        return []  # it is in the same memory there
    free = gpus > training
    return [f"ppo.reward.placement={f'gpu:{training}' if free else 'cpu'}"]


def _spread(config: Config) -> list[str]:
    """Return overrides by which a process holds less of weights and optimizer state."""
    section = config.distributed
    begun, several = section.strategy, section.processes > 1
    moves = several and begun not in _SHARDED and _allowed(config, strategy=StrategyName.fsdp)
    if moves and begun is StrategyName.ddp:
        offloads = _allowed(config, strategy=StrategyName.fsdp, offload=True)
        return ["distributed.strategy=fsdp", *([_OFFLOAD] if offloads else [])]
    found = [_OFFLOAD] if not section.offload and _allowed(config, offload=True) else []
    if moves:
        found.append("distributed.strategy=fsdp (the stage begins anew)")
    return found


_OFFLOAD = "distributed.offload=true"


def _allowed(config: Config, **changes: StrategyName | bool) -> bool:
    """Return whether these changes of `distributed` go with the rest of the config."""
    changed = replace(config, distributed=replace(config.distributed, **changes))  # type: ignore[arg-type]
    return set(map(str, config_problems(changed))) <= set(map(str, config_problems(config)))


def _of_host_memory(config: Config) -> list[str]:
    """Return overrides by which processes take less of the machine's own memory."""
    found = ["distributed.offload=false"] if config.distributed.offload else []
    if config.model.dtype is not Dtype.bfloat16:
        found.append("model.dtype=bfloat16 (other results)")
    return found


def _device() -> torch.device:
    """Return the device of this process; a GPU that is not in use yet is not taken into use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _place(device: torch.device) -> str:
    return "the machine" if device.type == "cpu" else str(device)
