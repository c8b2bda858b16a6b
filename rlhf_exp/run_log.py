"""The log of a single run: what its console shows, as plain text, with warnings and errors.

Jobs of a multirun and of Slurm have their whole output in logs already (`launchers/`). Here is the
log of a run that was started by hand. Live lines become one line every 10 s
(`tracking/progress_bar.py`).
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rlhf_exp.redaction import without_secrets

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def log_path(output_dir: Path, name: str, key: str) -> Path:
    """Return the log of a run, or of a point of a multirun."""
    return output_dir / "sweeps" / name / "logs" / f"{key}.log"


def open_log(output_dir: Path, name: str, key: str) -> Path:
    """Return the log of a run, whose folder exists then; earlier starts stay in it."""
    path = log_path(output_dir, name, key)
    with suppress(OSError):  # the record, beside it, is written next, and says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def append(path: Path | str, text: str) -> None:
    """Append lines, each with the time; what cannot be logged never ends a run."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = without_secrets(_ESCAPES.sub("", text)).rstrip().splitlines()
    with suppress(OSError), open(path, "a", encoding="utf-8", errors="replace") as file:
        file.write("".join(f"{now}  {line}\n" for line in lines))


@contextmanager
def recording(path: Path | str | None) -> Iterator[None]:
    """Append the log records of this process to a run's log inside the block.

    Ours from INFO on, those of libraries from WARNING on. Warnings are shown on the console as
    before. Nothing is done without a path, or if an outer block does it already.
    """
    root, ours = logging.getLogger(), logging.getLogger("rlhf_exp")
    if path is None or any(isinstance(handler, _LogFile) for handler in root.handlers):
        yield
        return
    handlers: list[logging.Handler] = [_LogFile(path)]
    if not root.handlers:
        handlers.append(_LastResort(logging.WARNING))
    level = ours.level
    ours.setLevel(logging.INFO)
    for one in handlers:
        root.addHandler(one)
    try:
        yield
    finally:
        ours.setLevel(level)
        for one in handlers:
            root.removeHandler(one)


class _LogFile(logging.Handler):
    """Appends records to the log of a run."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        append(self._path, f"{record.levelname.lower()}: {self.format(record)}")


class _LastResort(logging.Handler):
    """Prints what Python's own last resort would print, were there no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless its logger has a handler of its own."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.parent is not None:
            if logger.handlers:
                return
            logger = logger.parent
        if logging.lastResort is not None:
            logging.lastResort.handle(record)


class Tee(io.TextIOBase):
    """A text stream whose lines also go to a run's log.

    Args:
        stream: The console's stream.
        path: The log.
    """

    def __init__(self, stream: TextIO, path: Path | str) -> None:
        self._stream, self._path = stream, path
        self._line = ""

    def write(self, text: str) -> int:
        """Write to the stream, and each line that ends to the log."""
        self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        if any(map(str.strip, lines)):
            append(self._path, "\n".join(lines))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self._stream.encoding or "utf-8"
