"""A tensor that is computed once for all runs that need it, and kept by content."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.distributed.world import World
from rlhf_exp.store.sealed import Damaged, check_sealed_file, seal_file

log = logging.getLogger(__name__)


def kept_tensor(path: Path, what: str, compute: Callable[[], Tensor], world: World) -> Tensor:
    """Return the tensor in a file, or what `compute` returns, which is then kept there.

    Args:
        path: A `.npy` file whose name tells its content from any other.
        what: What it holds, in the words of a warning that it is damaged.
        compute: Called in every process; returns the same in each.
        world: The processes, of which the main one reads and writes.
    """
    stored = world.broadcast_object(_read(path, what) if world.is_main else None)
    if stored is not None:
        return torch.from_numpy(stored)
    values = compute()
    if world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with seal_file(path) as draft, draft.open("wb") as file:
            np.save(file, values.numpy())
    return values


def _read(path: Path, what: str) -> np.ndarray | None:
    """Return the values in a file; `None` if it is missing or damaged."""
    try:
        check_sealed_file(path)
        values: np.ndarray = np.load(path, allow_pickle=False)
        return values
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        log.warning("%s: %s; they are computed again", what, error)
        return None
