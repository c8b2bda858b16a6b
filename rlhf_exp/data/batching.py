"""Tokenized sets to tensors.

Dimensions: B rows, S tokens of a row, P prompt tokens. Every batch is right-padded with zeros and
no wider than its longest row.

The order of training rows: a pure function of (rows, batch size, seed, step).

A resumed run needs no saved data position beyond its step, and any process can work out any batch.
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
from rlhf_exp.data.tokenized import TokenizedDemonstrations, TokenizedPreferences, TokenizedPrompts

LossOn = Literal["all", "response"]


@dataclass(frozen=True)
class PackedRow:
    """Sequences that share one row, by their numbers in their set."""

    source: TokenizedDemonstrations
    members: tuple[int, ...]
    loss_on: LossOn

    def __len__(self) -> int:
        """Return the row's tokens."""
        prompts, responses = self.source.prompt_ids, self.source.response_ids
        return sum(len(prompts[i]) + len(responses[i]) for i in self.members)


def pack_demonstrations(
    demonstrations: TokenizedDemonstrations, seq_length: int, packing: bool, loss_on: LossOn
) -> list[PackedRow]:
    """Return the rows to train on: several sequences in each, or one where `packing` is off.

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


def demonstrations_batch(rows: Sequence[PackedRow]) -> Demonstrations:
    """Return the packed rows as one batch."""
    shape = (len(rows), max(len(row) for row in rows))
    tokens, positions, segments = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    target_mask = np.zeros(shape, dtype=bool)
    for line, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row.members, 1):
            prompt = row.source.prompt_ids[number]
            whole = np.concatenate([prompt, row.source.response_ids[number]])
            end = start + len(whole)
            tokens[line, start:end] = whole
            positions[line, start:end] = np.arange(len(whole))
            segments[line, start:end] = segment
            # Nothing stands before a sequence's first token, so it is never a target.
            first = 1 if row.loss_on == "all" else max(len(prompt), 1)
            target_mask[line, start + first : end] = True
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
    given = np.ones(len(index)) if weights is None else np.asarray(weights)
    return Preferences(*chosen, *rejected, torch.from_numpy(given.astype(np.float32)))


def prompts_batch(prompts: TokenizedPrompts, index: np.ndarray, rollout: np.ndarray) -> Prompts:
    """Return the prompts at `index` ([B] int64), numbered `rollout` ([B] int64) in the run."""
    tokens, lengths = right_padded([(prompts.prompt[i],) for i in index])
    numbers = (torch.from_numpy(np.array(values, dtype=np.int64)) for values in (index, rollout))
    return Prompts(tokens, lengths, *numbers)


def right_padded(rows: Sequence[tuple[np.ndarray, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's parts joined, right-padded: tokens [B, S] int64 and lengths [B] int64."""
    lengths = [sum(len(part) for part in parts) for parts in rows]
    tokens = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    for line, parts in enumerate(rows):
        tokens[line, : lengths[line]] = np.concatenate(parts)
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64)


def _first_fit_decreasing(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return groups of row numbers whose lengths sum to at most `room`, oldest group first.

    A tree over the groups holds the largest space left below each node, which finds the first group
    with enough of it in logarithmic time.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    space = [room] * (2 * leaves)  # space[1] is the root, space[leaves + g] group g
    groups: list[list[int]] = []
    for number in order:
        node = 1
        while node < leaves:
            node = 2 * node if space[2 * node] >= lengths[number] else 2 * node + 1
        if node - leaves == len(groups):
            groups.append([])
        groups[node - leaves].append(number)
        space[node] -= lengths[number]
        while node > 1:
            node //= 2
            space[node] = max(space[2 * node], space[2 * node + 1])
    return groups


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


def length_sorted_micro_batches(lengths: Tensor, rows: int | None) -> Iterator[Tensor]:
    """Yield the numbers of the rows of each micro-batch, longest rows first.

    A micro-batch costs as much as its longest row, so rows of like length go together; the largest
    comes first, so that what does not fit into memory fails at once.

    Args:
        lengths: [B] int64.
        rows: Rows of a micro-batch; `None`: all in one.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    yield from order.split(rows or max(len(order), 1))
