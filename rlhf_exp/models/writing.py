"""Writes a model as a plain Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

DEEPSPEED = "deepspeed"


def write_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write config and safetensors of a model that nothing wraps."""
    with _deepspeed_unseen():
        model.save_pretrained(folder)


@contextmanager
def _deepspeed_unseen() -> Iterator[None]:
    """Let DeepSpeed, unless it is imported, look as if it were not installed.

    `save_pretrained` takes off what accelerate knows to wrap modules, and accelerate imports
    DeepSpeed, where it finds it, to recognise its engine: a quarter of a second, and up to ten
    times as much, in a process that has no use for it. Without DeepSpeed imported there cannot be
    an engine. `None` in `sys.modules` is Python's own way to say that a module is not to be had.
    """
    if DEEPSPEED in sys.modules:
        yield
        return
    sys.modules[DEEPSPEED] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[DEEPSPEED]
