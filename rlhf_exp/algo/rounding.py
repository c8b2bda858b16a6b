"""Standard deviations that are nothing but rounding: dividing by one would magnify noise."""

from __future__ import annotations

ROUNDING = 2.0**-18
"""Of the largest of some float32 numbers, what their differences may be by rounding alone: 32 times
float32's resolution, for scores of equal answers computed in batches of different shape."""


def is_rounding(std: float, largest: float) -> bool:
    """Return whether numbers of standard deviation `std` are equal, but for rounding.

    Args:
        std: at least 0.
        largest: absolute value of about the largest of them, or of what they are differences of.
    """
    return std <= ROUNDING * largest


def divisor(std: float, largest: float) -> float:
    """Return `std`, or 1 where it is 0 or rounding; arguments as in `is_rounding`."""
    return 1.0 if std == 0.0 or is_rounding(std, largest) else std
