"""The protocol of a distributed training strategy, and the functions that all strategies share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import decoder_parts


class Strategy(Protocol):
    """Distributed training of one module: it, its optimizer, and their wrappers.

    Every method is called by all processes, in the same order: most of them communicate.

    Attributes:
        wrapped: The module to call for forward passes with gradients.
        optimizer: Its `param_groups` hold the learning rate.
        layout: Layout of `state`, as in `OptimizerState.layout`.
    """

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    layout: str

    def begin(self, last: bool) -> None:
        """Prepare the next forward pass.

        Args:
            last: Whether it is the last one before the optimizer step.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; after the last backward pass they are averaged over processes."""

    def step(self) -> float:
        """Clip gradients, step the optimizer, drop the gradients; return the norm before clipping.

        If the norm is not finite, the weights cannot be used afterwards.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Gather all parameters in the module itself, for forward passes without gradients."""

    def weights(self) -> dict[str, Tensor]:
        """Return the full trained parameters by name; empty in all but the main process.

        They are float32 if the optimizer steps float32 copies.
        """

    def state(self) -> dict[str, Any]:
        """Return the content of this process's file of the optimizer's state."""

    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """Load full weights by name, and the optimizer state that `state` returned."""

    def release(self, weights: Mapping[str, Tensor] | None, everywhere: bool) -> None:
        """Unwrap the module and give it full parameters.

        Args:
            weights: Values of trained parameters by name, where they are not those of now.
            everywhere: Whether every process needs them, on its device. If not, a strategy that
                divides weights gives them to the main process alone, in host memory.
        """


FULL_LAYOUT = "whole"
"""Layout of a checkpoint in which the first process's file holds all of the optimizer's state."""

ROW_LAYOUT = "rows"
"""Layout in which each process's file holds its rows (first dimension) of every tensor."""


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's state in a checkpoint.

    Attributes:
        layout: Its distribution over the files: `FULL_LAYOUT`, `ROW_LAYOUT`, or the name of a
            strategy if only this strategy, with as many processes, can read them.
        processes: Number of processes that wrote it.
        read: Returns the content of a process's file, given its rank.
    """

    layout: str
    processes: int
    read: Callable[[int], dict[str, Any]]


def check_layout(saved: OptimizerState, layout: str) -> None:
    """Check that a saved optimizer state has this layout, and one file for each process.

    Raises:
        UserError: Another strategy, or another number of processes, wrote it.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if (saved.layout, saved.processes) == (layout, processes):
        return
    wrote = {FULL_LAYOUT: "ddp (or single)", ROW_LAYOUT: "fsdp"}.get(saved.layout, saved.layout)
    raise UserError(
        f"the checkpoint was written with distributed={wrote} by {saved.processes} processes, and "
        f"this run has {processes} with another way to keep the optimizer's state, or another "
        f"number: {layout}. Resume as it was begun, with distributed.processes={saved.processes}, "
        "or begin the stage anew with rerun=STAGE"
    )


def full_states(saved: OptimizerState) -> dict[str, Any]:
    """Return the full optimizer state of each parameter by name.

    Raises:
        UserError: The checkpoint's layout is one that only its own strategy can read.
    """
    if saved.layout == FULL_LAYOUT:
        return saved.read(0)["parameters"]
    if saved.layout != ROW_LAYOUT:
        check_layout(saved, "one that ddp, fsdp and single share")
    files = [saved.read(rank)["parameters"] for rank in range(saved.processes)]
    # Of several copies of the weights only the first one's processes have written parts.
    parts = [states for states in files if states] or files[:1]
    return {
        name: {
            key: torch.cat([part[name][key] for part in parts]) if value.ndim else value
            for key, value in state.items()
        }
        for name, state in parts[0].items()
    }


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def check_parameter_names(
    module: nn.Module, weights: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, after checking that `weights` has these names.

    Raises:
        ValueError: The names differ.
    """
    targets = trainable(module)
    if targets.keys() != weights.keys():
        differing = sorted(targets.keys() ^ weights.keys())[:5]
        raise ValueError(f"weights do not fit the module; they differ in {differing}")
    return targets


def decoders_of(module: nn.Module) -> list[PreTrainedModel]:
    """Return the language models of a module: itself, or those among its children."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [child for child in module.children() if isinstance(child, PreTrainedModel)]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a module's language models."""
    return [block for model in decoders_of(module) for block in decoder_parts(model).blocks]


@torch.no_grad()
def take_from_main(module: nn.Module, device: torch.device) -> None:
    """Put a module's tensors on the device, with the values that the main process has.

    In other processes they may be on torch's meta device. Tensors that a strategy has divided
    already stay.

    Args:
        module: Its parameters and buffers are replaced, unless they are on the device.
        device: Of this process.
    """
    fresh: dict[Tensor, Tensor] = {}

    def taken(tensor: Tensor) -> Tensor:
        if tensor not in fresh:
            value = tensor.detach()
            if tensor.is_meta:
                value = torch.empty_like(value, device=device)
            elif tensor.device != device:
                value = value.to(device)
            distributed.broadcast(value, 0)
            fresh[tensor] = tensor
            if tensor.device != device:
                parameter, trains = isinstance(tensor, nn.Parameter), tensor.requires_grad
                fresh[tensor] = nn.Parameter(value, trains) if parameter else value
        return fresh[tensor]

    for part in module.modules():
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is not None and not _is_divided(tensor):
                    tensors[name] = taken(tensor)


def _is_divided(tensor: Tensor) -> bool:
    """Whether this process has a part of a tensor only: by FSDP, or by ZeRO 3 (`ds_id`)."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def released(full: Tensor, device: torch.device, everywhere: bool) -> Tensor:
    """Return a parameter's full value as `Strategy.release` gives it to this process."""
    if everywhere:
        return full.to(device)
    return full.cpu() if distributed.get_rank() == 0 else torch.empty_like(full, device="meta")


def clip_and_step(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, grad_norm: float
) -> float:
    """Clip gradients, step the optimizer if their norm is finite, drop them; return the norm."""
    total = nn.utils.clip_grad_norm_(parameters, grad_norm)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state of each parameter by its name."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def load_state_by_name(
    module: nn.Module, optimizer: torch.optim.Optimizer, states: Mapping[str, Any]
) -> None:
    """Load an optimizer state that `state_by_name` returned."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    numbered = {number: states[name] for number, name in enumerate(order) if name in states}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_STATE_DICT_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ModuleSnapshot:
    """The classes and hooks of a module's parts before a strategy wraps them, to restore them.

    Args:
        module: The module, not yet wrapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._classes = {part: type(part) for part in module.modules()}
        self._hooks = {
            (part, kind): set(getattr(part, kind))
            for part in module.modules()
            for kind in (*_FORWARD_HOOKS, *_STATE_DICT_HOOKS)
        }

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Turn off the forward hooks that the strategy has added, while the context lasts.

        Hooks that are added meanwhile stay.
        """
        removed = {
            (part, kind): dict(getattr(part, kind))
            for part, kind in self._hooks
            if kind in _FORWARD_HOOKS
        }
        self._drop(_FORWARD_HOOKS)
        try:
            yield
        finally:
            for (part, kind), hooks in removed.items():
                current: dict[int, Any] = getattr(part, kind)
                added = {key: hook for key, hook in current.items() if key not in hooks}
                current.clear()
                current.update(hooks | added)  # in their old order: some must come first

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Restore classes and hooks, and set new parameters with these values by name."""
        self._drop((*_FORWARD_HOOKS, *_STATE_DICT_HOOKS))
        fresh: dict[nn.Parameter | None, nn.Parameter | None] = {None: None}
        for name, parameter in self._module.named_parameters():
            fresh[parameter] = nn.Parameter(values[name], requires_grad=parameter.requires_grad)
        for part, kind in self._classes.items():
            part._parameters = {key: fresh[p] for key, p in part._parameters.items()}
            part.__class__ = kind

    def _drop(self, kinds: tuple[str, ...]) -> None:
        """Remove the hooks of these kinds that were not there before."""
        for (part, kind), before in self._hooks.items():
            if kind in kinds:
                hooks = getattr(part, kind)
                for key in set(hooks) - before:
                    del hooks[key]
