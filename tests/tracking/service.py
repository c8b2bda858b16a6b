"""W&B's own process, which runs beside each process that records."""

from __future__ import annotations

import psutil


def kill_service() -> None:
    """Kill W&B's own process, as a system out of memory may."""
    (service,) = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "wandb-core" in " ".join(child.cmdline())
    ]
    service.kill()
    service.wait()
