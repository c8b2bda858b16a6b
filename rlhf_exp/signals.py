"""Signals that end a run: SIGTERM, and SIGHUP, which a terminal sends when it is closed.

Both unwind the work by a `SystemExit`, so that records are closed, leases released and workers
ended. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED, HUNG_UP, TERMINATED = 130, 129, 143
"""Exit codes that shells report for Ctrl-C, SIGHUP and SIGTERM: 128 and the signal's number."""
ENDING = (signal.SIGTERM, signal.SIGHUP)


def ending_signals() -> list[signal.Signals]:
    """Return the signals of `ENDING` that have their default action, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Turn signals that end a run into `SystemExit` inside the block.

    Handlers that other code has set stay.
    """
    handled = ending_signals()
    for number in handled:
        signal.signal(number, exit_on_signal)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: raise `SystemExit` with its exit code."""
    if number == signal.SIGHUP:
        leave_terminal()
    raise SystemExit(128 + number)


def leave_terminal() -> None:
    """Send further output to nowhere: a closed terminal makes each write an error."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
            # A closed terminal is no terminal any more (`isatty`), but still a device.
            if stream is not None and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
