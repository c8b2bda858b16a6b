"""Slurm's notice (USR2) that a job has to go: before its time limit, or for a more urgent job.

Slurm signals every process of a job, and a signal that nothing handles kills. So USR2 stays blocked
in the main process and in everything it starts, from its first line on, and one thread of the main
process waits for it: a notice that comes early is not lost, and no child acts on one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNAL = signal.SIGUSR2


def block() -> None:
    """Keep notices for `noticing`; call it before any other thread exists."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


@contextmanager
def noticing(grace_s: float, leave: Callable[[], None]) -> Iterator[threading.Event]:
    """Turn a notice into Ctrl-C, which saves where it can; leave in any case after `grace_s`.

    Args:
        grace_s: Seconds in which the block may end by itself.
        leave: Called in another thread when they are over; ends the process.

    Yields:
        What is set as soon as a notice has come.
    """
    came, over = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        signal.sigwait({SIGNAL})
        if over.is_set():
            return
        came.set()
        say("Slurm gives notice: leaving, to go on later")
        signal.pthread_kill(main, signal.SIGINT)
        if not over.wait(grace_s):
            leave()

    thread = threading.Thread(target=wait, name="notice", daemon=True)
    thread.start()
    try:
        yield came
    finally:
        over.set()
        if not came.is_set() and thread.ident is not None:
            signal.pthread_kill(thread.ident, SIGNAL)
        thread.join()
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Write a line into the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def exit_now() -> None:
    """End this process without the exit handlers of libraries, which may wait for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
