"""The end of a process that an error may have left with its process group open."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def exit_after(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end this process with the exit code that it returns or raises.

    A process that leaves with its group open is aborted by the group's threads in one of eight
    cases (gloo, torch 2.13): its exit code is then 134, whatever it had to say. So it leaves
    without waiting for them.
    """
    code: object = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        sys.exit(code)  # type: ignore[arg-type]
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()  # W&B closes its records in one of these
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
