"""What a strategy does for the module that trains, and what all of them share.

A strategy holds one module, its optimizer, and what wraps them. Every call is made by all
processes, in the same order: most of them communicate.

Taking a strategy's hooks off a module: for a while, or for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from rlhf_exp.errors import UserError

WHOLE = "whole"
"""The first process's file holds all of the optimizer's state."""

ROWS = "rows"
"""Each process's file holds its part of every tensor, cut along the first dimension."""


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's state in a checkpoint.

    Attributes:
        layout: How it is spread over the files: `WHOLE`, `ROWS`, or a strategy's name where none
            but this strategy, with as many processes, can read them.
        processes: How many wrote it.
        read: Returns the content of the file of a process.
    """

    layout: str
    processes: int
    read: Callable[[int], dict[str, Any]]


class Strategy(Protocol):
    """How a module trains over all processes.

    Attributes:
        wrapped: What forward passes with gradients go through.
        optimizer: Its `param_groups` hold the learning rate.
        layout: Of `state`, as `OptimizerState.layout`.
    """

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    layout: str

    def begin(self, last: bool) -> None:
        """Be told, before each forward pass, whether it is the last one before the step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; after the last backward pass they are averaged over processes."""

    def step(self) -> float:
        """Clip, step the optimizer, drop the gradients; return the norm before clipping.

        Where the norm is not finite, the weights are of no use afterwards.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Hold all parameters whole in the module itself, for forward passes without gradients."""

    def weights(self) -> dict[str, Tensor]:
        """Return what trains by name, whole, float32 where trained so; in the main process only."""

    def state(self) -> dict[str, Any]:
        """Return this process's part of the optimizer's state."""

    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """Go on from `weights` and what the processes' `state` returned."""

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """Make the module plain and whole in every process, with `weights` if given."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def check_names(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return what trains in `module`, after seeing that `weights` have the same names.

    Raises:
        ValueError: The names differ.
    """
    targets = trainable(module)
    if targets.keys() != weights.keys():
        odd = sorted(targets.keys() ^ weights.keys())[:5]
        raise ValueError(f"weights do not fit the module; they differ in {odd}")
    return targets


def clip_and_step(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, grad_norm: float
) -> float:
    """Clip gradients, step unless their norm is not finite, drop them; return the norm."""
    found = nn.utils.clip_grad_norm_(parameters, grad_norm)
    norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
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
    """Take back what `state_by_name` returned."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    found = {number: states[name] for number, name in enumerate(order) if name in states}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found})


def refuse_layout(saved: OptimizerState, layout: str) -> None:
    """Refuse an optimizer state that only another strategy, or another number, can read.

    Raises:
        UserError: `saved` is not of this layout and of as many processes as there are.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if (saved.layout, saved.processes) == (layout, processes):
        return
    wrote = {WHOLE: "ddp (or single)", ROWS: "fsdp"}.get(saved.layout, saved.layout)
    raise UserError(
        f"the checkpoint was written with distributed={wrote} by {saved.processes} processes, and "
        f"this run has {processes} with another way to keep the optimizer's state, or another "
        f"number: {layout}. Resume as it was begun, with distributed.processes={saved.processes}, "
        "or begin the stage anew with rerun=STAGE"
    )


def whole_states(saved: OptimizerState) -> dict[str, Any]:
    """Return the whole state of each parameter, whoever wrote it.

    Raises:
        UserError: Only the strategy that wrote it can read it.
    """
    if saved.layout == WHOLE:
        return saved.read(0)["parameters"]
    if saved.layout != ROWS:
        refuse_layout(saved, "one that ddp, fsdp and single share")
    parts = [saved.read(rank)["parameters"] for rank in range(saved.processes)]
    return {
        name: {
            key: torch.cat([part[name][key] for part in parts]) if value.ndim else value
            for key, value in state.items()
        }
        for name, state in parts[0].items()
    }


_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_STATE = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Before:
    """What a module's parts were before a strategy took hold of them.

    Args:
        module: The module, still plain.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._classes = {part: type(part) for part in module.modules()}
        self._hooks = {
            (part, kind): set(getattr(part, kind))
            for part in module.modules()
            for kind in (*_FORWARD, *_STATE)
        }

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Call no forward hook that was not there before, while the context lasts.

        Hooks that come meanwhile stay.
        """
        kept = {
            (part, kind): dict(getattr(part, kind))
            for part, kind in self._hooks
            if kind in _FORWARD
        }
        self._drop(_FORWARD)
        try:
            yield
        finally:
            for (part, kind), hooks in kept.items():
                now: dict[int, Any] = getattr(part, kind)
                new = {key: hook for key, hook in now.items() if key not in hooks}
                now.clear()
                now.update(hooks | new)  # in their old order: some must come first

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Make the module plain again, its parameters fresh ones of these values by name."""
        self._drop((*_FORWARD, *_STATE))
        fresh: dict[nn.Parameter | None, nn.Parameter | None] = {None: None}
        for name, parameter in self._module.named_parameters():
            fresh[parameter] = nn.Parameter(values[name], requires_grad=parameter.requires_grad)
        for part, kind in self._classes.items():
            part._parameters = {key: fresh[p] for key, p in part._parameters.items()}
            part.__class__ = kind

    def _drop(self, kinds: tuple[str, ...]) -> None:
        for (part, kind), before in self._hooks.items():
            if kind in kinds:
                hooks = getattr(part, kind)
                for key in set(hooks) - before:
                    del hooks[key]
