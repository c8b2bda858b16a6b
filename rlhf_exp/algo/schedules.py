"""Learning-rate schedules, as multipliers of the peak rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def lr_multiplier(
    schedule: Schedule, step: int, steps: int, warmup_steps: int, floor: float = 0.0
) -> float:
    """Return what to multiply the peak learning rate by at optimizer step `step` (from 0).

    During the warm-up it rises linearly to 1, which the last warm-up step reaches; the first step
    is above 0 already. Then it stays, or falls from 1 towards `floor`, which it reaches when
    `steps` steps are done, and where it stays.

    Args:
        schedule: `constant`, `linear`, or `cosine` (Loshchilov & Hutter 2017, eq. 5).
        step: number of optimizer steps taken before this one.
        steps: of the whole run, warm-up included.
        warmup_steps: of the warm-up; 0 for none.
        floor: share of the peak rate to end with; `constant` ignores it.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * remaining
