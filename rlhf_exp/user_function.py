"""Functions of the user's own: loading them, and calling them without trusting them.

Whatever such a function does, the run ends with an error that names it, or has one finite number
for each row: a function that exits, that raises, that changes the lists it is given, or that
returns something else, has no other way out.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, SupportsFloat, TypeVar

from rlhf_exp.errors import UserError
from rlhf_exp.function_source import function_module, function_source

T = TypeVar("T")
MAX_FLOAT32 = 3.4028234663852886e38
"""Largest number that a 32-bit float, as scores are computed with, can hold."""
# Signals that end a run; their handlers raise in the midst of the function.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOWN = 80


class UserFunction:
    """A user's function that takes lists of texts and returns as many numbers.

    Args:
        function: the function.
        name: the config key with its value, for errors.
        row: what a row is called in errors, such as `response`.
        lowest: the smallest number that it may return.
        highest: the largest.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        row: str,
        lowest: float = -MAX_FLOAT32,
        highest: float = MAX_FLOAT32,
    ) -> None:
        self.function, self.name, self.row = function, name, row
        self.lowest, self.highest = lowest, highest

    def __call__(self, *columns: Sequence[str]) -> list[float]:
        """Return a number for each row.

        Args:
            columns: the function's arguments, of equal length; errors show a row by the last one.

        Raises:
            UserError: the function failed or tried to exit, or returned something else.
        """
        # Copies: a function may change its lists.
        copies = [list(column) for column in columns]
        shown, count = columns[-1], len(columns[-1])
        with _guarded(f"{self.name} failed on {count} {self.row}s"):
            answer = self.function(*copies)
            refused = isinstance(answer, str | bytes | Mapping | Set)
            if refused or not isinstance(answer, Iterable):
                raise _Refused(
                    f"{self.name} returned {type(answer).__name__}; return a list of numbers, "
                    f"one for each {self.row}"
                )
            # One more than wanted tells a generator that goes on for ever.
            values = list(islice(answer, count + 1))
            if len(values) != count:
                number = f"more than {count}" if len(values) > count else str(len(values))
                if isinstance(answer, Sequence):
                    number = str(len(answer))
                raise _Refused(
                    f"{self.name} returned {number} scores for {count} {self.row}s; return one "
                    "number for each"
                )
            return [self._number(value, text) for value, text in zip(values, shown, strict=True)]

    def _number(self, value: object, text: str) -> float:
        number = None
        if isinstance(value, SupportsFloat) and not isinstance(value, str | bytes):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            except (TypeError, ValueError, RuntimeError):  # the last of torch
                pass
        if number is not None and self.lowest <= number <= self.highest:  # false for NaN too
            return number
        found = f"{_short(repr(value))} ({type(value).__name__})" if number is None else str(number)
        expected = "a finite number"
        if (self.lowest, self.highest) != (-MAX_FLOAT32, MAX_FLOAT32):
            expected = f"a number from {self.lowest:g} to {self.highest:g}"
        raise _Refused(
            f"{self.name} returned {found} for the {self.row} {text[:_SHOWN]!r}; return {expected}"
        )


class UserReader:
    """A user's function that takes the path of a file and returns, or yields, its records.

    Args:
        function: the function.
        name: the config key with its value, for errors.
    """

    def __init__(self, function: Callable[[Path], Any], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, path: Path, limit: int | None) -> list[tuple[str, object]]:
        """Return ("file:number", record) of each record, from 1.

        Args:
            path: the file.
            limit: most records that are asked for; `None`: all.

        Raises:
            UserError: the function failed or tried to exit, or returned something else.
        """
        with _guarded(f"{self.name} failed on {path}"):
            answer = self.function(path)
            if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
                raise _Refused(
                    f"{self.name} returned {type(answer).__name__} for {path}; return or yield a "
                    "dict for each row"
                )
            return [(f"{path}:{n}", record) for n, record in enumerate(islice(answer, limit), 1)]


def load_function(reference: str, key: str = "ppo.reward.function") -> Callable[..., Any]:
    """Load a user's function, given as `file.py:name` or `package.module:name`.

    Args:
        reference: the file or module, and the function's name.
        key: the config key that named it, for errors.

    Raises:
        UserError: the file cannot be run, or has no function of that name.
    """
    path, name = function_source(reference)
    module_name = function_module(reference)
    if module_name is not None:
        return _of_module(module_name, name, f"{key}={reference}")
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{key}={reference}: no Python file at {path.absolute()}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _guarded(f"{key}={reference}: running {path} failed"):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}={reference}: {path} has no function {name!r}")
    return function


def _of_module(module_name: str, name: str, given: str) -> Callable[..., Any]:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing of the user's takes the place of a library
    with _guarded(f"{given}: importing {module_name} failed"):
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{given}: {module_name} has no function {name!r}")
    return function


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


class _Refused(Exception):
    """What a function returned cannot be used; the message is for the user."""


class _Exited(BaseException):
    """A function called `os._exit`; no handler of its own is to catch it."""


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into a `UserError`, unless a signal raised it.

    Args:
        what: the beginning of the message.

    Raises:
        UserError: the code raised, or tried to end the process.
    """
    try:
        with _signals_noted() as raised, _exit_refused():
            try:
                yield
            except _Refused:
                raise
            except BaseException as error:
                raise _Refused(_description(what, error)) from error
            finally:
                if raised:  # Ctrl-C, or told to end: not the code's doing, and not its to ignore
                    raise raised[0]
    except _Refused as error:
        raise UserError(str(error)) from error.__cause__


def _description(what: str, error: BaseException) -> str:
    """Return what went wrong in a user's code, and where."""
    place = _last_place(error.__traceback__)
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be shown)"
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    hint = ""
    if isinstance(error, SystemExit | _Exited):
        said = f"it tried to end the program ({'os._exit' if isinstance(error, _Exited) else said})"
        hint = "; raise an exception with a message instead"
    return f"{what} at {place}: {said}{hint}"


def _last_place(trace: TracebackType | None) -> str:
    """Return file and line of the innermost call outside of this module."""
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "its call"


@contextmanager
def _signals_noted() -> Iterator[list[BaseException]]:
    """Yield a list of what the handlers of signals that end a run raise inside the block."""
    raised: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():
        yield raised
        return
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    # A default action raises nothing here.
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            before[signal.Signals(number)](number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    for number in before:
        signal.signal(number, handle)
    try:
        yield raised
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exit_refused() -> Iterator[None]:
    """Make `os._exit` raise inside the block, in this thread of this process.

    It would end the run without a word, with success if its argument is 0.
    """
    exit_now, owner = os._exit, (os.getpid(), threading.get_ident())

    def refuse(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != owner:  # a child of the function's, or a thread
            exit_now(status)
        raise _Exited(f"os._exit({status})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = exit_now
