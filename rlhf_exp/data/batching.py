"""Batches of tensors from tokenized data: their order, their packing, their padding.

Dimensions: B rows, S tokens of a row, P prompt tokens. Every batch is right-padded with zeros and
no wider than its longest row.

The order of training rows is a pure function of the number of rows, batch size, seed and step. So a
resumed run needs no saved data position beyond its step, and any process can compute any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.batch import Demonstrations, Preferences, Prompts
from rlhf_exp.data.tokenized import (
    RaggedArray,
    TokenizedDemonstrations,
    TokenizedPreferences,
    TokenizedPrompts,
)

LossOn = Literal["all", "response"]


def batch_index(row_count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the rows of optimizer step `step` (counted from 0).

    The epochs are concatenated and cut into batches: a batch may span two epochs, none is short,
    and no remainder is dropped.

    Returns:
        [batch] int64.
    """
    assert row_count > 0, "no rows to draw from"
    first, last = step * batch, (step + 1) * batch
    pieces = []
    for epoch in range(first // row_count, (last - 1) // row_count + 1):
        start = epoch * row_count
        order = epoch_permutation(row_count, seed, epoch)
        pieces.append(order[max(first - start, 0) : last - start])
    return np.concatenate(pieces)


@lru_cache(maxsize=8)
def epoch_permutation(row_count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `row_count` rows in an epoch.

    Returns:
        [n] int64, read-only.
    """
    order = np.random.default_rng([seed, epoch]).permutation(row_count)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class PackedRow:
    """Sequences of one row of a batch, by their numbers in `source`."""

    source: TokenizedDemonstrations
    members: tuple[int, ...]
    loss_on: LossOn

    def __len__(self) -> int:
        """Return the number of tokens in the row."""
        prompts, responses = self.source.prompt_ids, self.source.response_ids
        return sum(len(prompts[i]) + len(responses[i]) for i in self.members)


def pack_demonstrations(
    demonstrations: TokenizedDemonstrations, seq_length: int, packing: bool, loss_on: LossOn
) -> list[PackedRow]:
    """Return the rows to train on: several sequences in each with `packing`, else one.

    Packing is first-fit-decreasing (Johnson 1973: at most 11/9 of the fewest rows possible); equal
    lengths keep their order, so the rows depend on nothing but the set.
    """
    lengths = demonstrations.prompt_ids.lengths() + demonstrations.response_ids.lengths()
    assert not len(lengths) or int(lengths.max()) <= seq_length, "a sequence exceeds seq_length"
    if packing:
        groups = _first_fit_decreasing(lengths.tolist(), seq_length)
    else:
        groups = [[number] for number in range(len(lengths))]
    return [PackedRow(demonstrations, tuple(group), loss_on) for group in groups]


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return groups of row numbers whose lengths sum to at most `capacity`, oldest group first.

    Each node of a tree over the groups holds the largest space left in a group below it, so the
    first group with enough space is found in logarithmic time.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    space = [capacity] * (2 * leaves)  # space[1] is the root, space[leaves + g] is group g
    groups: list[list[int]] = []
    for row in order:
        node = 1
        while node < leaves:
            node = 2 * node if space[2 * node] >= lengths[row] else 2 * node + 1
        if node - leaves == len(groups):
            groups.append([])
        groups[node - leaves].append(row)
        space[node] -= lengths[row]
        while node > 1:
            node //= 2
            space[node] = max(space[2 * node], space[2 * node + 1])
    return groups


def demonstrations_batch(rows: Sequence[PackedRow]) -> Demonstrations:
    """Return the packed rows as one batch."""
    shape = (len(rows), max(len(row) for row in rows))
    tokens, positions, segments = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    target_mask = np.zeros(shape, dtype=bool)
    for row_number, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row.members, 1):
            prompt = row.source.prompt_ids[number]
            sequence = np.concatenate([prompt, row.source.response_ids[number]])
            end = start + len(sequence)
            tokens[row_number, start:end] = sequence
            positions[row_number, start:end] = np.arange(len(sequence))
            segments[row_number, start:end] = segment
            # A sequence's first token has no context, so it is never a target.
            first = 1 if row.loss_on == "all" else max(len(prompt), 1)
            target_mask[row_number, start + first : end] = True
            start = end
    return Demonstrations(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        torch.from_numpy(target_mask),
    )


def preferences_batch(
    preferences: TokenizedPreferences, index: np.ndarray, weights: np.ndarray | None = None
) -> Preferences:
    """Return the pairs at `index` ([B] int64) as one batch; `weights` ([B]) default to 1."""
    chosen = right_padded([(preferences.prompt[i], preferences.chosen[i]) for i in index])
    rejected = right_padded([(preferences.prompt[i], preferences.rejected[i]) for i in index])
    weight_values = np.ones(len(index)) if weights is None else np.asarray(weights)
    return Preferences(*chosen, *rejected, torch.from_numpy(weight_values.astype(np.float32)))


def pair_lengths(preferences: TokenizedPreferences, index: np.ndarray) -> Tensor:
    """Return the tokens [B] of the longer side, prompt included, of the pairs at `index` [B]."""
    longer = np.maximum(preferences.chosen.lengths(), preferences.rejected.lengths())
    return torch.from_numpy((preferences.prompt.lengths() + longer)[index].astype(np.int64))


def pack_pairs(
    preferences: TokenizedPreferences, index: np.ndarray, seq_length: int
) -> tuple[Demonstrations, Tensor]:
    """Return both sides of the pairs at `index` ([n] int64), packed into rows of `seq_length`.

    Returns:
        The rows, whose targets are the response tokens, and the side [N] int64 that each of their N
        targets belongs to: 0 to n - 1 are the chosen ones, n to 2 n - 1 the rejected.
    """
    prompts = [preferences.prompt[i] for i in index]
    responses = [side[i] for side in (preferences.chosen, preferences.rejected) for i in index]
    sides = TokenizedDemonstrations(RaggedArray.of(prompts * 2), RaggedArray.of(responses), 0, 0)
    rows = pack_demonstrations(sides, seq_length, packing=True, loss_on="response")
    batch = demonstrations_batch(rows)
    members = np.array([member for row in rows for member in row.members], dtype=np.int64)
    # Without a prompt the first token has no context, and is no target.
    targets = sides.response_ids.lengths() - (sides.prompt_ids.lengths() == 0)
    return batch, torch.from_numpy(members.repeat(targets[members]))


def packed_pair_parts(
    preferences: TokenizedPreferences,
    shares: Sequence[np.ndarray],
    pairs: int | None,
    seq_length: int,
) -> list[list[Tensor]]:
    """Return each process's micro-batches of pairs that are to be packed, by number in its share.

    As few as have room: a micro-batch has no more packed rows than `pairs` of the longest pairs
    would fill. Every process has as many, for some strategies wait for each other in each.

    Args:
        preferences: The pairs.
        shares: [n] int64 for each process, the pairs of its share; n is the same in all.
        pairs: Pairs of a micro-batch without packing; `None`: one micro-batch of the whole share.
        seq_length: Tokens of a row.
    """
    if pairs is None or not len(shares[0]):
        return [[torch.arange(len(share))] for share in shares]
    prompts = preferences.prompt.lengths()
    sides = [prompts + side.lengths() for side in (preferences.chosen, preferences.rejected)]
    orders = [np.argsort(-np.maximum(*sides)[share], kind="stable") for share in shares]

    def fits(share: np.ndarray, part: np.ndarray) -> bool:
        lengths = np.concatenate([side[share[part]] for side in sides])
        return len(_first_fit_decreasing(lengths.tolist(), seq_length)) <= 2 * pairs

    for count in range(1, -(-len(shares[0]) // pairs) + 1):
        # Dealt out by length, so that all are about as large.
        parts = [[order[number::count] for number in range(count)] for order in orders]
        if all(fits(shares[rank], part) for rank, own in enumerate(parts) for part in own):
            break
    return [[torch.from_numpy(part) for part in own] for own in parts]


def response_lengths(preferences: TokenizedPreferences, index: np.ndarray) -> Tensor:
    """Return the tokens [n, 2] of the chosen and rejected responses of the pairs at `index` [n]."""
    sides = [side.lengths()[index] for side in (preferences.chosen, preferences.rejected)]
    return torch.from_numpy(np.stack(sides, axis=1).astype(np.int64))


def prompts_batch(prompts: TokenizedPrompts, index: np.ndarray, rollout: np.ndarray) -> Prompts:
    """Return the prompts at `index` ([B] int64) with their numbers `rollout` ([B] int64)."""
    tokens, lengths = right_padded([(prompts.prompt[i],) for i in index])
    numbers = (torch.from_numpy(np.array(values, dtype=np.int64)) for values in (index, rollout))
    return Prompts(tokens, lengths, *numbers)


def right_padded(rows: Sequence[tuple[np.ndarray, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate each row's parts and pad: tokens [B, S] int64 and lengths [B] int64."""
    lengths = [sum(len(part) for part in parts) for parts in rows]
    tokens = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    for row_number, parts in enumerate(rows):
        tokens[row_number, : lengths[row_number]] = np.concatenate(parts)
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64)


def length_sorted_micro_batches(lengths: Tensor, rows: int | None) -> Iterator[Tensor]:
    """Yield the row numbers of each micro-batch, longest rows first.

    A micro-batch costs as much as its longest row, so rows of similar length go together. The
    longest come first, so that running out of memory happens at once.

    Args:
        lengths: [B] int64.
        rows: Rows of a micro-batch; `None`: one micro-batch of all rows.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    yield from order.split(rows or max(len(order), 1))


def length_sorted_shares(
    rows: np.ndarray, lengths: np.ndarray, processes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deal rows out to processes by length, longest first.

    All processes have rows of like lengths at like places, so that none waits long for another
    where they compute micro-batches in step.

    Args:
        rows: [M] row numbers.
        lengths: of all rows, by their numbers.
        processes: P.

    Returns:
        The rows of each process [P, n] int64, longest first, and their weights [P, n] float32: 0
        for copies of the shortest row, which only fill shares up, else 1.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    each = -(-len(order) // processes)
    filled = np.concatenate([order, order[-1:].repeat(each * processes - len(order))])
    weights = (np.arange(len(filled)) < len(order)).astype(np.float32)
    return filled.reshape(each, processes).T, weights.reshape(each, processes).T
