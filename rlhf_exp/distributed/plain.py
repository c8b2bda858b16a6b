"""Taking a strategy's hooks off a module: for a while, or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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
