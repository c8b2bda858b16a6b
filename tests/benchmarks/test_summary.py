from __future__ import annotations

import pytest
from side_by_side.protocol import Reading
from side_by_side.summary import (
    check_equal_work,
    compare,
    learning_markdown,
    medians_markdown,
    ratios_markdown,
)

MIB = 1024 * 1024


def reading(total: float, peak_mib: int = 100, **changed: float) -> Reading:
    return Reading({"total": total}, peak_mib * MIB, **changed)  # type: ignore[arg-type]


def test_ratios_are_taken_between_neighbours() -> None:
    # Pairs 4/1, 6/2, 10/10: ratios 4, 3, 1 with median 3. The ratio of the medians (6/2) would
    # also be 3, so the second pair is made the odd one: 4/1, 20/2, 10/10 -> 4, 10, 1, median 4,
    # where the medians are 2 and 10.
    ours = [reading(1.0), reading(2.0), reading(10.0)]
    peer = [reading(4.0), reading(20.0), reading(10.0)]
    row = compare(ours, peer)[0]
    assert (row.name, row.ours, row.peer) == ("total (s)", 2.0, 10.0)
    assert (row.ratio, row.low, row.high) == (4.0, 1.0, 10.0)


def test_memory_is_the_highest_peak_with_and_without_libraries() -> None:
    ours = [reading(1.0, 300), reading(1.0, 340)]
    peer = [reading(1.0, 850), reading(1.0, 800)]
    whole, beyond = compare(ours, peer, our_start=200 * MIB, peer_start=430 * MIB)[1:]
    assert (whole.ours, whole.peer, whole.ratio) == (340.0, 850.0, 2.5)
    assert (beyond.ours, beyond.peer, beyond.ratio) == (140.0, 420.0, 3.0)


def test_a_phase_that_one_side_lacks_is_left_out() -> None:
    ours = [Reading({"sample": 1.0, "total": 2.0}, MIB)]
    peer = [Reading({"total": 2.0}, MIB)]
    assert [row.name for row in compare(ours, peer)] == ["total (s)", "peak memory (MiB)"]


def test_unequal_work_is_refused() -> None:
    same = {"a": reading(1.0, samples=64, updates=16), "b": reading(9.0, samples=64, updates=16)}
    check_equal_work(same)
    with pytest.raises(ValueError, match="updates 16 for a, 4 for c"):
        check_equal_work(same | {"c": reading(1.0, samples=64, updates=4)})


def test_medians_stand_side_by_side() -> None:
    ours = [reading(1.0), reading(5.0, 140), reading(2.0)]
    readings = {"native": ours, "native-bf16": [reading(0.5)] * 3, "trl": [reading(8.0)] * 3}
    started = {"native": 40 * MIB, "native-bf16": 50 * MIB, "trl": 60 * MIB}
    assert medians_markdown(readings, started).splitlines() == [
        "| | native | native-bf16 | trl |",
        "|---|---:|---:|---:|",
        "| total (s) | 2.00 | 0.50 | 8.00 |",
        "| peak memory (MiB) | 140 | 100 | 100 |",
        "| peak memory beyond libraries (MiB) | 100 | 50 | 40 |",
    ]


def test_ratios_have_their_range() -> None:
    quick, slow = [reading(1.0), reading(1.0)], [reading(4.0), reading(2.0)]
    pairs = {"trl / native": compare(quick, slow), "trl / native-bf16": compare(slow, slow)}
    assert ratios_markdown(pairs).splitlines()[2:] == [
        "| total | 3.00 (2.00 to 4.00) | 1.00 |",
        "| peak memory | 1.00 | 1.00 |",
    ]


def test_rewards_are_averaged_over_groups_at_equal_samples() -> None:
    ours = [reading(1.0, samples=10, reward=value) for value in (1.0, 2.0, 3.0)]
    peer = [reading(1.0, samples=10, reward=value) for value in (0.0, 1.0, 5.0)]
    table = learning_markdown({"ours": ours, "peer": peer}, group=2)
    # Groups of two iterations: (1 + 2) / 2, (0 + 1) / 2 after 20 samples; the rest alone after 30.
    assert table.splitlines()[2:] == ["| 20 | 1.500 | 0.500 |", "| 30 | 3.000 | 5.000 |"]
