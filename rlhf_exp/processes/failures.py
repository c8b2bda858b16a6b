"""Failures of processes: their description across processes, and exit codes.

A process describes its exception as a `ProcessFailure`, the leader picks the root cause of several
and raises it as its own, and `exit_after` turns it into the exit code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from threading import Event
from typing import Any, NoReturn, Self

from rlhf_exp.errors import UserError
from rlhf_exp.redaction import formatted_exception
from rlhf_exp.signals import INTERRUPTED, TERMINATED
from rlhf_exp.store.atomic_files import write_error

USER = 2
"""Exit code of an error that the user can mend."""


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message has its rank and traceback."""


class FailedElsewhere(RuntimeError):
    """Another process of the group failed, and reports the reason itself."""


class WorkerGone(WorkerFailed):
    """A process of the run was killed, or its machine does not answer any more."""


class FailureKind(StrEnum):
    """Kinds of failure."""

    user = "user"
    gone = "gone"
    bug = "bug"
    interrupted = "interrupted"
    stopped = "stopped"
    elsewhere = "elsewhere"


@dataclass(frozen=True)
class ProcessFailure:
    """The failure of a process, as plain values.

    Attributes:
        rank: Rank of the process.
        kind: Kind of failure.
        text: Message of a `UserError`, a traceback, or a description of how the process ended.
    """

    rank: int
    kind: FailureKind
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Self:
        """Return the failure that an exception in the process of `rank` is."""
        if isinstance(error, UserError):
            return cls(rank, FailureKind.user, str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, FailureKind.interrupted, str(error))
        if isinstance(error, SystemExit):
            return cls(rank, FailureKind.stopped, str(error.code))
        if isinstance(error, FailedElsewhere):
            return cls(rank, FailureKind.elsewhere, str(error))
        if isinstance(error, Exception) and (refused := write_error(error)) is not None:
            return cls(rank, FailureKind.user, str(refused))
        return cls(rank, FailureKind.bug, formatted_exception(error))

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """Return the failure in a message."""
        return cls(message["rank"], FailureKind(message["kind"]), message["text"])

    def message(self) -> dict[str, Any]:
        """Return the failure as JSON values."""
        return asdict(self)

    def reraise(self) -> NoReturn:
        """Raise the failure in this process.

        Raises:
            UserError: The process raised it.
            KeyboardInterrupt: The user interrupted the process.
            SystemExit: The process was told to exit.
            WorkerGone: The process was killed.
            WorkerFailed: Any other failure.
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


def root_cause(failures: list[ProcessFailure]) -> ProcessFailure:
    """Return the failure that the others follow from.

    Args:
        failures: Failures in the order in which they became known.
    """
    own = [failure for failure in failures if failure.kind is not FailureKind.elsewhere] or failures
    # A killed process reports nothing, and its death may be noticed last: the others fail because
    # it is absent, or are stopped because of it.
    gone = [failure for failure in own if failure.kind is FailureKind.gone]
    return gone[0] if gone and own[0].kind in (FailureKind.bug, FailureKind.stopped) else own[0]


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code for an exception; 0 for none."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return USER
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def describe_exit(code: int) -> str:
    """Return in words how a process ended, from its exit code in `multiprocessing`."""
    if code >= 0:
        return f"ended without a word, with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}. The same command goes on from the last checkpoint"


_was_in_group = Event()


def note_group() -> None:
    """Note for `exit_after` that this process has been in a process group."""
    _was_in_group.set()


def exit_after(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with the code that it returns or raises.

    The threads of a process group abort one exiting process in ten (gloo and DDP, torch 2.13), even
    after the group was destroyed, and the exit code is then 134. So a process that has been in a
    group exits without waiting for its threads.
    """
    code: object = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if not _was_in_group.is_set():
        sys.exit(code)  # type: ignore[arg-type]
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()  # W&B closes its records in one of these
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
