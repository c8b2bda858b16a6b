"""Numbers as a reader wants them: ticks on round values, three digits, times in words."""

from __future__ import annotations

import math

from rlhf_exp.evaluation.metric import DASH, MINUS


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return about `target` round values (1, 2 or 5 times a power of ten) within [low, high].

    Args:
        low: lower end, finite.
        high: upper end, finite and above `low`.
        target: number of steps aimed at.
    """
    assert low < high, (low, high)
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """Write ticks with the decimals that their spacing needs; thousands as `2k`."""
    if len(ticks) < 2:
        return [short(tick) for tick in ticks]
    step = ticks[1] - ticks[0]
    largest = max(abs(tick) for tick in ticks)
    if largest < 1e-3 or largest >= 1e6:
        return [short(tick) for tick in ticks]
    if largest >= 10_000:
        return [_signed(f"{tick / 1000:.{_decimals(step / 1000)}f}") + "k" for tick in ticks]
    return [_signed(f"{tick + 0.0:,.{_decimals(step)}f}") for tick in ticks]


def short(value: float) -> str:
    """Write a number with three significant digits: `0.0123`, `1.23`, `12,300`, `1.2e−05`."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e7:
        return _signed(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:,.{digits}f}"
    if value == int(value) and size >= 1:
        text = f"{int(value):,}"
    return _signed(text)


def count_label(value: int | None) -> str:
    """Write a large count: `1.31M`, `864k`, `512`; a dash for `None`."""
    if value is None:
        return DASH
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def duration(seconds: float | None) -> str:
    """Write a time in its two largest units: `3 h 07 min`, `2 min 05 s`, `8.3 s`."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
