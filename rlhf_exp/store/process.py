"""Which process works on a run, so that others can tell whether it still does."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rlhf_exp.store.holders import namespace


@dataclass(frozen=True)
class Process:
    """A process, told from all others of all machines.

    Attributes:
        host: Name of its machine.
        pid: Its number there.
        namespace: Tells apart processes of containers on one host.
        started: When it was started, in the kernel's clock ticks: numbers are used again.
    """

    host: str
    pid: int
    namespace: str
    started: str

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, namespace(), _started(pid))

    @property
    def gone(self) -> bool:
        """Whether it has ended; of other machines' and containers' processes nobody knows."""
        if (self.host, self.namespace) != (socket.gethostname(), namespace()):
            return False
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return _started(self.pid) != self.started


def _started(pid: int) -> str:
    """Return when a process was started; nothing where the kernel does not say."""
    with suppress(OSError):
        # The name, in parentheses, may hold anything; the start is the 20th value after it.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A process that has ended, and whose parent has not asked for its exit code yet.
        return "" if values[0] == "Z" else values[19]
    return ""
