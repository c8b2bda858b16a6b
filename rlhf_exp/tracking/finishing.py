"""Closing a tracker however the work ends: done, failed, interrupted or told to stop.

A run that is not finished is shown as running or crashed, loses its last rows, and is shared with
the next job of the same process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rlhf_exp.tracking.tracker import Tracker

INTERRUPTED = 130  # what shells report for a process that SIGINT ended
TERMINATED = 143  # ... SIGTERM


@contextmanager
def finishing(tracker: Tracker) -> Iterator[Tracker]:
    """Finish `tracker` at the end of the block, with the exit code that the end deserves.

    0 at the end of the block, 1 for an exception, 130 for Ctrl-C, the code of a `SystemExit`. After
    130 and 143 the run is marked as preempted: it will be continued.

    SIGTERM is turned into `SystemExit(143)` inside the block, so that the work unwinds to here
    instead of W&B being called from a handler, in the middle of anything. A handler that somebody
    else has set (one that writes a checkpoint first) stays; it should end in `SystemExit(143)`.
    """
    in_charge = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if in_charge:
        signal.signal(signal.SIGTERM, _terminate)
    code = 1
    try:
        yield tracker
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if in_charge:  # an impatient second signal must not cut off the writing
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if code in (INTERRUPTED, TERMINATED):
                tracker.mark_preempting()
            tracker.finish(code)
        finally:
            if in_charge:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
