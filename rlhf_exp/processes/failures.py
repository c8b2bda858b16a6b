"""How work in another process failed, told in words that cross processes.

The end of a process that has been in a process group.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from threading import Event
from typing import Any, NoReturn, Self

from rlhf_exp.errors import UserError

USER, INTERRUPTED, TERMINATED = 2, 130, 143
"""Exit codes: the user's to mend, Ctrl-C, SIGTERM."""


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message has its rank and its traceback."""


class FailedElsewhere(RuntimeError):
    """Another process of the group failed, and tells the user itself."""


class WorkerGone(WorkerFailed):
    """A process of the run was killed, or its machine does not answer any more."""


class FailureKind(StrEnum):
    """Why work ended."""

    user = "user"
    gone = "gone"
    bug = "bug"
    interrupted = "interrupted"
    stopped = "stopped"
    elsewhere = "elsewhere"


@dataclass(frozen=True)
class ProcessFailure:
    """How a process failed.

    Attributes:
        rank: Its number.
        kind: Why.
        text: The message of the user's error, or the traceback, or how the process ended.
    """

    rank: int
    kind: FailureKind
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Self:
        """Describe an exception that was met by `rank`."""
        if isinstance(error, UserError):
            return cls(rank, FailureKind.user, str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, FailureKind.interrupted, str(error))
        if isinstance(error, SystemExit):
            return cls(rank, FailureKind.stopped, str(error.code))
        if isinstance(error, FailedElsewhere):
            return cls(rank, FailureKind.elsewhere, str(error))
        return cls(rank, FailureKind.bug, "".join(traceback.format_exception(error)))

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """Return what `message` describes."""
        return cls(message["rank"], FailureKind(message["kind"]), message["text"])

    def message(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def throw(self) -> NoReturn:
        """Raise in this process what ended the other one.

        Raises:
            UserError: The same one.
            KeyboardInterrupt: The user stopped the run there.
            SystemExit: It was told to stop.
            WorkerGone: It was killed.
            WorkerFailed: Anything else.
        """
        match self.kind:
            case FailureKind.user:
                raise UserError(self.text)
            case FailureKind.interrupted:
                raise KeyboardInterrupt(self.text)
            case FailureKind.stopped:
                raise SystemExit(int(self.text) if self.text.isdigit() else TERMINATED)
            case FailureKind.gone:
                raise WorkerGone(f"the process of rank {self.rank} {self.text}")
            case FailureKind.bug | FailureKind.elsewhere:
                raise WorkerFailed(f"rank {self.rank} failed:\n\n{self.text}")


def cause(failures: list[ProcessFailure]) -> ProcessFailure:
    """Return the failure that the others follow from.

    Args:
        failures: In the order in which they became known.
    """
    own = [one for one in failures if one.kind is not FailureKind.elsewhere] or failures
    # Who was killed says nothing, and may be missed last: the others complain of its absence, or
    # are told to stop because of it.
    gone = [one for one in own if one.kind is FailureKind.gone]
    return gone[0] if gone and own[0].kind in (FailureKind.bug, FailureKind.stopped) else own[0]


def code_of(error: BaseException | None) -> int:
    """Return the exit code that an exception leads to."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return USER
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def ended(code: int) -> str:
    """Return how a process ended, from its exit code as `multiprocessing` gives it."""
    if code >= 0:
        return f"ended without a word, with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}. The same command goes on from the last checkpoint"


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
