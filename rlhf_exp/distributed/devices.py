"""The GPUs that this process sees, by the names that `CUDA_VISIBLE_DEVICES` knows them by."""

from __future__ import annotations

import os

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """Return the names of the visible GPUs; none on a machine without.

    torch counts them without taking them into use.
    """
    given = os.environ.get(VISIBLE)
    if given == "":
        return []
    import torch  # late: seconds, for processes that otherwise only wait for others

    count = torch.cuda.device_count()
    # What stands behind the first name that is none is not visible, so the first ones count.
    names = map(str, range(count)) if given is None else given.split(",")[:count]
    return [name.strip() for name in names]


def only(devices: list[str]) -> dict[str, str]:
    """Return the variables of a process that is to see these GPUs; none: no variables."""
    return {VISIBLE: ",".join(devices)} if devices else {}
