"""The end of a process that has been in a process group."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from threading import Event
from typing import NoReturn

_grouped = Event()


def note_group() -> None:
    """Remember that this process has been in a process group."""
    _grouped.set()


def exit_after(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end this process with the exit code that it returns or raises.

    Threads of a process group abort one process in ten on its way out (gloo and DDP, torch 2.13),
    also after the group was destroyed: the exit code is then 134, whatever the process had to say.
    So it leaves without waiting for them.
    """
    code: object = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if not _grouped.is_set():
        sys.exit(code)  # type: ignore[arg-type]
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()  # W&B closes its records in one of these
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
