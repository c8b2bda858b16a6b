"""Tokenized sets to batches.

The order of training rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_exp.data.batching import (
    batch_index,
    demonstrations_batch,
    epoch_permutation,
    length_sorted_shares,
    pack_demonstrations,
    pack_pairs,
    packed_pair_parts,
    preferences_batch,
    prompts_batch,
)
from rlhf_exp.data.tokenized import (
    RaggedArray,
    TokenizedDemonstrations,
    TokenizedPreferences,
    TokenizedPrompts,
)


def demonstrations(*lengths: tuple[int, int]) -> TokenizedDemonstrations:
    """Rows of (prompt, response) lengths; the tokens of row n are 10 n + 1, 10 n + 2, ..."""
    prompts, responses = [], []
    for number, (prompt, response) in enumerate(lengths):
        tokens = list(range(10 * number + 1, 10 * number + 1 + prompt + response))
        prompts.append(tokens[:prompt])
        responses.append(tokens[prompt:])
    return TokenizedDemonstrations(RaggedArray.of(prompts), RaggedArray.of(responses), 0, 0)


def test_packing_puts_the_longest_first_and_each_where_it_fits_first() -> None:
    # Lengths 5 4 3 3 2, room 8: 5 | 4 | 5+3 | 4+3 | 2 fits neither (0 and 1 left).
    rows = pack_demonstrations(
        demonstrations((1, 4), (2, 2), (1, 2), (1, 2), (1, 1)), 8, True, "all"
    )
    assert [row.members for row in rows] == [(0, 2), (1, 3), (4,)]
    assert [len(row) for row in rows] == [8, 7, 2]


def test_packing_equals_the_slow_search_for_the_first_that_fits() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    expected: list[list[int]] = []
    for number in np.argsort(-lengths, kind="stable"):
        fits = [g for g in expected if sum(lengths[i] for i in g) + lengths[number] <= 64]
        if fits:
            fits[0].append(int(number))
        else:
            expected.append([int(number)])
    whole = demonstrations(*((0, int(length)) for length in lengths))
    rows = pack_demonstrations(whole, 64, True, "all")
    assert [list(row.members) for row in rows] == expected


def test_without_packing_every_sequence_has_its_row() -> None:
    rows = pack_demonstrations(demonstrations((1, 2), (2, 2)), 99, False, "all")
    assert [row.members for row in rows] == [(0,), (1,)]
    assert pack_demonstrations(demonstrations(), 9, True, "all") == []


def test_a_packed_batch_by_hand() -> None:
    # Row 0 holds sequence 0 (prompt 2, response 2) and 1 (prompt 1, response 1), row 1 sequence 2.
    rows = pack_demonstrations(demonstrations((2, 2), (1, 1), (1, 2)), 6, True, "response")
    assert [row.members for row in rows] == [(0, 1), (2,)]
    batch = demonstrations_batch(rows)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 11, 12], [21, 22, 23, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.target_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]


def test_loss_on_all_leaves_out_only_the_first_token_of_each_sequence() -> None:
    rows = pack_demonstrations(demonstrations((2, 2), (1, 1), (1, 2)), 6, True, "all")
    mask = demonstrations_batch(rows).target_mask
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_an_empty_prompts_first_token_is_no_target(loss_on: str) -> None:
    (row,) = pack_demonstrations(demonstrations((0, 3)), 6, True, loss_on)  # type: ignore[arg-type]
    assert demonstrations_batch([row]).target_mask.int().tolist() == [[0, 1, 1]]


def test_batches_are_as_wide_as_their_longest_row() -> None:
    rows = pack_demonstrations(demonstrations((2, 4), (1, 2)), 9, False, "all")
    assert demonstrations_batch(rows).tokens.shape == (2, 6)
    assert demonstrations_batch(rows[1:]).tokens.shape == (1, 3)


def test_preferences_batch() -> None:
    pairs = TokenizedPreferences(
        RaggedArray.of([[1], [2, 2]]),
        RaggedArray.of([[3, 3], [4]]),
        RaggedArray.of([[5], [6, 6, 6]]),
        0,
        0,
    )
    batch = preferences_batch(pairs, np.array([1, 0]))
    assert batch.chosen.tolist() == [[2, 2, 4], [1, 3, 3]]
    assert batch.rejected.tolist() == [[2, 2, 6, 6, 6], [1, 5, 0, 0, 0]]
    assert (batch.chosen_lengths.tolist(), batch.rejected_lengths.tolist()) == ([3, 3], [5, 2])
    assert batch.weights.tolist() == [1.0, 1.0]
    weighted = preferences_batch(pairs, np.array([0, 0]), np.array([1, 0]))
    assert (weighted.weights.tolist(), weighted.weights.dtype) == ([1.0, 0.0], torch.float32)


def test_prompts_batch() -> None:
    prompts = TokenizedPrompts(RaggedArray.of([[1], [2, 2]]), RaggedArray.of([[], []]), 0, 0)
    batch = prompts_batch(prompts, np.array([1, 0]), np.array([40, 41]))
    assert batch.tokens.tolist() == [[2, 2], [1, 0]]
    assert batch.lengths.tolist() == [2, 1]
    assert (batch.index.tolist(), batch.rollout.tolist()) == ([1, 0], [40, 41])
    assert batch.tokens.dtype == batch.rollout.dtype == torch.int64


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


def preferences(*lengths: tuple[int, int, int]) -> TokenizedPreferences:
    """Pairs of (prompt, chosen, rejected) lengths; tokens count on from 100 times the pair."""
    columns: tuple[list[list[int]], ...] = ([], [], [])
    for number, sizes in enumerate(lengths):
        start = 100 * number
        for column, size in zip(columns, sizes, strict=True):
            column.append(list(range(start, start + size)))
            start += size
    return TokenizedPreferences(*map(RaggedArray.of, columns), 0, 0)


def test_pairs_are_packed_by_hand() -> None:
    # Sides: chosen 2+1 and 1+1 tokens, rejected 2+3 and 1+2. Room 6: 5 | 3+3 | 2.
    batch, side = pack_pairs(preferences((9, 9, 9), (2, 1, 3), (1, 1, 2)), np.array([1, 2]), 6)
    assert batch.tokens.tolist() == [
        [100, 101, 103, 104, 105, 0],
        [100, 101, 102, 200, 202, 203],
        [200, 201, 0, 0, 0, 0],
    ]
    assert batch.target_mask.sum(1).tolist() == [3, 3, 1]
    assert side.tolist() == [2, 2, 2, 0, 3, 3, 1]


def test_a_response_without_a_prompt_has_one_target_less() -> None:
    batch, side = pack_pairs(preferences((0, 2, 3)), np.array([0]), 9)
    assert batch.tokens[batch.target_mask].tolist() == [3, 4, 1]
    assert side.tolist() == [1, 1, 0]


@pytest.mark.parametrize("processes", [1, 3])
def test_packed_micro_batches_have_no_more_rows_than_unpacked_ones(processes: int) -> None:
    drawn = np.random.default_rng(0).integers(1, 16, (30, 3))
    pairs = preferences(*((int(a), int(b), int(c)) for a, b, c in drawn))
    shares = np.arange(30).reshape(processes, -1)
    found = packed_pair_parts(pairs, list(shares), 2, 40)
    counts = {len(parts) for parts in found}
    assert len(counts) == 1
    assert 1 < counts.pop() < len(shares[0]) / 2  # 2 pairs each is what it would be unpacked
    for share, parts in zip(shares, found, strict=True):
        assert sorted(torch.cat(parts).tolist()) == list(range(len(share)))
        assert all(len(pack_pairs(pairs, share[part.numpy()], 40)[0]) <= 4 for part in parts)


def test_pairs_of_full_rows_stay_alone() -> None:
    parts = packed_pair_parts(preferences(*[(4, 4, 4)] * 6), [np.arange(6)], 1, 8)
    assert [part.tolist() for part in parts[0]] == [[0], [1], [2], [3], [4], [5]]
    (whole,) = packed_pair_parts(preferences(*[(4, 4, 4)] * 6), [np.arange(6)], None, 8)
    assert [part.tolist() for part in whole] == [[0, 1, 2, 3, 4, 5]]


def test_shares_are_dealt_by_length() -> None:
    lengths = np.array([9, 4, 7, 7, 1, 8, 3])
    shares, weights = length_sorted_shares(np.array([6, 3, 0, 2, 5]), lengths, 2)
    # Longest first: 0 (9), 5 (8), 3 (7, named before 2), 2 (7), 6 (3), which also fills up.
    assert shares.tolist() == [[0, 3, 6], [5, 2, 6]]
    assert weights.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_one_process_gets_all_rows_longest_first() -> None:
    shares, weights = length_sorted_shares(np.array([2, 0, 1]), np.array([5, 6, 5]), 1)
    assert shares.tolist() == [[1, 2, 0]]
    assert weights.tolist() == [[1, 1, 1]]
