"""From readings to a comparison: medians, and ratios taken pair by pair.

Two runs that alternate on one machine share its noise, so a ratio is that of neighbours, and what
is reported is the median of the ratios with their range.
"""

from __future__ import annotations

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


def check_equal_work(ours: Reading, peer: Reading) -> None:
    """Raise `ValueError` unless both sides made the same samples, tokens and updates."""
    for name in ("samples", "tokens", "updates"):
        mine, theirs = getattr(ours, name), getattr(peer, name)
        if mine != theirs:
            raise ValueError(f"not the same work: {name} {mine} for us, {theirs} for the peer")


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


def markdown(rows: list[Row], our_name: str, peer_name: str) -> str:
    """Return the rows as a markdown table."""
    lines = [
        f"| | {our_name} | {peer_name} | {peer_name} / {our_name} | range over pairs |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        digits = 0 if "MiB" in row.name else 2
        spread = "" if row.low == row.high else f"{row.low:.2f} to {row.high:.2f}"
        lines.append(
            f"| {row.name} | {row.ours:.{digits}f} | {row.peer:.{digits}f} "
            f"| {row.ratio:.2f} | {spread} |"
        )
    return "\n".join(lines) + "\n"


def alone_markdown(readings: list[Reading], name: str) -> str:
    """Return one side's medians (and highest peak) as a markdown table."""
    lines = [f"| | {name} |", "|---|---:|"]
    lines += [
        f"| {row.name} | {row.ours:.{0 if 'MiB' in row.name else 2}f} |"
        for row in compare(readings, readings)
    ]
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
