"""The order of training rows."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_exp.data.order import batch_index, epoch_permutation


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (10, 5), (7, 20), (1, 4)])
def test_every_pass_shows_every_row_once_and_no_remainder_is_dropped(n: int, batch: int) -> None:
    steps = 6 * n
    drawn = np.concatenate([batch_index(n, batch, 3, step) for step in range(steps)])
    assert len(drawn) == steps * batch
    passes = drawn[: len(drawn) // n * n].reshape(-1, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward = [batch_index(50, 8, 1, step).tolist() for step in range(20)]
    epoch_permutation.cache_clear()
    backward = [batch_index(50, 8, 1, step).tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [batch_index(50, 8, 2, step).tolist() for step in range(20)]


def test_passes_differ_from_one_another() -> None:
    assert epoch_permutation(50, 0, 0).tolist() != epoch_permutation(50, 0, 1).tolist()


def test_the_order_is_the_one_that_old_checkpoints_count_on() -> None:
    # Written down once; a change here would make resumed runs see other rows.
    assert epoch_permutation(8, 0, 0).tolist() == PINNED


def test_a_callers_change_to_a_batch_does_not_reach_the_next_one() -> None:
    batch_index(4, 4, 0, 0)[:] = 0
    assert sorted(batch_index(4, 4, 0, 0)) == [0, 1, 2, 3]


PINNED = [2, 4, 3, 6, 5, 0, 1, 7]
