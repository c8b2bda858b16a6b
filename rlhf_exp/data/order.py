"""The order of training rows: a pure function of (rows, batch size, seed, step).

A resumed run needs no saved data position beyond its step, and any process can work out any batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `n` rows in pass number `epoch`.

    Returns:
        [n] int64, read-only.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def batch_index(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the rows of optimizer step `step` (counted from 0).

    The passes over the data are laid end to end and cut into batches, so that a batch may span two
    passes, none is short, and no remainder is dropped.

    Returns:
        [batch] int64.
    """
    assert n > 0, "no rows to draw from"
    first, last = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        start = epoch * n
        order = epoch_permutation(n, seed, epoch)
        parts.append(order[max(first - start, 0) : last - start])
    return np.concatenate(parts)
