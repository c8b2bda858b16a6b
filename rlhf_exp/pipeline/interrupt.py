"""Ctrl-C and SIGTERM.

Ctrl-C while training: the first saves at the end of the iteration, the second leaves at once.
Everywhere else (loading, waiting for another process, evaluating) there is nothing to save, and
Ctrl-C leaves at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

TERMINATED = 143  # what shells report for a process that SIGTERM ended


@contextmanager
def polite_interrupts(
    saves: Callable[[], bool] = lambda: True, tell: bool = True
) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user has pressed Ctrl-C inside the block.

    Args:
        saves: Whether there is something to save now.
        tell: Whether to say what happens; one of several processes does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set() or not saves():
            raise KeyboardInterrupt
        asked.set()
        if tell:
            print(
                "\ninterrupted: saving at the end of this iteration (Ctrl-C again leaves at once, "
                "back to the last checkpoint)",
                file=sys.stderr,
                flush=True,
            )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        # Asked for during the last iteration: the block is done, what comes after it is not wanted.
        raise KeyboardInterrupt


@contextmanager
def unwinding() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that what is held is let go, and others end, too.

    A handler that somebody else has set stays.
    """
    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if in_charge:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
