"""From readings to a comparison: medians, and ratios taken pair by pair.

Two runs that alternate on one machine share its noise, so a ratio is that of neighbours, and what
is reported is the median of the ratios with their range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from side_by_side.protocol import Reading

PHASES = ("sample", "score", "update", "total", "cpu")
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is compared, with its unit.
        ours: our median (or peak).
        peer: the peer's.
        ratio: the peer's over ours, the median over pairs; above 1 is better for us.
        low: the smallest ratio of a pair.
        high: the largest.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    low: float
    high: float


def check_equal_work(readings: Mapping[str, Reading]) -> None:
    """Raise `ValueError` unless all sides made the same samples, tokens and updates."""
    first, *others = readings
    for name in ("samples", "tokens", "updates"):
        expected = getattr(readings[first], name)
        for side in others:
            if getattr(readings[side], name) != expected:
                message = (
                    f"{name} {expected} for {first}, {getattr(readings[side], name)} for {side}"
                )
                raise ValueError(f"not the same work: {message}")


def compare(
    ours: list[Reading], peer: list[Reading], our_start: int = 0, peer_start: int = 0
) -> list[Row]:
    """Return the table of two equally long, alternated lists of readings.

    Args:
        ours: our readings, the i-th measured beside the peer's i-th.
        peer: the peer's.
        our_start: our resident bytes before any model was loaded; 0 leaves that line out.
        peer_start: the peer's.
    """
    rows = []
    for phase in PHASES:
        if all(phase in reading.seconds for reading in ours + peer):
            rows.append(
                _row(
                    f"{phase} (s)",
                    [reading.seconds[phase] for reading in ours],
                    [reading.seconds[phase] for reading in peer],
                )
            )
    rows.append(_memory_row("peak memory (MiB)", ours, peer, 0, 0))
    if our_start and peer_start:
        rows.append(
            _memory_row("peak memory beyond libraries (MiB)", ours, peer, our_start, peer_start)
        )
    return rows


def _row(name: str, ours: list[float], peer: list[float]) -> Row:
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    return Row(name, median(ours), median(peer), median(ratios), min(ratios), max(ratios))


def _memory_row(
    name: str, ours: list[Reading], peer: list[Reading], our_start: int, peer_start: int
) -> Row:
    mine = (max(reading.peak_bytes for reading in ours) - our_start) / MEBIBYTE
    theirs = (max(reading.peak_bytes for reading in peer) - peer_start) / MEBIBYTE
    ratio = theirs / mine
    return Row(name, mine, theirs, ratio, ratio, ratio)


def medians_markdown(readings: Mapping[str, Sequence[Reading]], started: Mapping[str, int]) -> str:
    """Return each side's medians (and highest peak) as a markdown table.

    Args:
        readings: of each side.
        started: resident bytes of each side before any model was loaded.
    """
    by_side = [
        {row.name: row for row in compare(list(own), list(own), started[side], started[side])}
        for side, own in readings.items()
    ]
    lines = ["| | " + " | ".join(readings) + " |", "|---|" + "---:|" * len(by_side)]
    for name in by_side[0]:
        digits = 0 if "MiB" in name else 2
        cells = [f"{rows[name].ours:.{digits}f}" if name in rows else "" for rows in by_side]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratios_markdown(pairs: Mapping[str, Sequence[Row]]) -> str:
    """Return the ratios of each pair of sides, with their range, as a markdown table."""
    lines = ["| times | " + " | ".join(pairs) + " |", "|---|" + "---:|" * len(pairs)]
    for rows in zip(*pairs.values(), strict=True):
        cells = [
            f"{row.ratio:.2f}"
            + ("" if row.low == row.high else f" ({row.low:.2f} to {row.high:.2f})")
            for row in rows
        ]
        name = rows[0].name.removesuffix(" (s)").removesuffix(" (MiB)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def learning_markdown(readings: dict[str, list[Reading]], group: int) -> str:
    """Return mean rewards after equal samples, averaged over `group` iterations a line."""
    names = list(readings)
    lines = ["| samples | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    count = min(len(row) for row in readings.values())
    for first in range(0, count, group):
        last = min(first + group, count)
        done = sum(reading.samples for reading in readings[names[0]][:last])
        means = [
            sum(reading.reward or 0.0 for reading in readings[name][first:last]) / (last - first)
            for name in names
        ]
        lines.append(f"| {done} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(row) for row in rows]
