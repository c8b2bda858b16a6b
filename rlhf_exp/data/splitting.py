"""Which prompts are held out, by hash.

Where a prompt goes depends on nothing but its own text, so that it stays there when a file grows or
is shuffled, and all rows of one prompt stay together, of whatever kind they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RANGE = 2**64


def held_out(
    keys: Iterable[str],
    own_test: set[str],
    validation_fraction: float,
    test_fraction: float,
) -> tuple[set[str], set[str]]:
    """Return the keys of the validation and of the test prompts.

    The highest hashes are put aside for validation; the lowest for test, unless the source has a
    test split of its own. A fraction above 0 puts aside at least one prompt, as long as that leaves
    one to train on.

    Args:
        keys: `prompt_key` of every row.
        own_test: keys of the source's own test split, or none.
        validation_fraction: of the hashes' range.
        test_fraction: the same; not used if there is an `own_test`.
    """
    free = sorted(set(keys) - own_test)
    test = own_test
    if not own_test:
        places = [_place(key) for key in free]
        test = set(free[: _count_below(places, test_fraction)])
        free = free[len(test) :]
    from_the_top = [1 - _place(key) for key in reversed(free)]
    validation = set(free[len(free) - _count_below(from_the_top, validation_fraction) :])
    return validation, test


def part_of(key: str, parts: int) -> int:
    """Return the part, 1 to `parts`, that a prompt's `prompt_key` belongs to.

    By other digits of the hash than `held_out`, so that every part is drawn from the whole range.
    """
    return int(key[16:32], 16) % parts + 1


def _place(key: str) -> float:
    """Return where in the hashes' range, 0 to 1, a key lies."""
    return int(key[:16], 16) / _RANGE


def _count_below(places: Sequence[float], fraction: float) -> int:
    """Return how many of the rising `places` lie below `fraction`: at least 1, but not all."""
    if fraction <= 0:
        return 0
    below = sum(place < fraction for place in places)
    return max(min(max(below, 1), len(places) - 1), 0)
