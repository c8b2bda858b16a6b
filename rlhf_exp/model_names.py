"""What names of models and files say: the revision of a hub id, which files hold weights."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

PICKLED = (".bin", ".pt", ".pth")
SHARDS = "pytorch_model*.bin"
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model")
"""Beginnings of the names of pickled files that hold something else than a model's weights."""


def split_revision(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Return the hub id (or folder) and the revision that a name says.

    Args:
        name: A folder, which is returned as it is, or a hub id with or without `@REVISION`.
        revision: What counts where the name says none.
    """
    text = str(name)
    hub_id, at, named = text.partition("@")
    if at and named and not Path(text).exists():
        return hub_id, named
    return text, revision


def pickled_weight_names(names: Iterable[str]) -> list[str]:
    """Return which files hold a model's pickled weights; none where it has safetensors.

    Args:
        names: Of the files of a folder or repository.
    """
    own = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") for name in own):
        return []
    found = [name for name in own if name.endswith(PICKLED) and not name.startswith(NO_WEIGHTS)]
    if "pytorch_model.bin" in found:
        return ["pytorch_model.bin"]
    return sorted([name for name in found if fnmatch(name, SHARDS)] or found)
