"""A process of another interpreter that trains with a library of its own, and the line to it.

The worker is at the other end of a connection. Its output goes to a log. It ends with this process,
because the connection does; a Ctrl-C of the terminal is this process's alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf_exp.errors import UserError
from rlhf_exp.processes.channel import Channel, Message
from rlhf_exp.processes.environment import worker_environment

# By name, so that the code of the worker counts as code of the stage.
_WORKER = (
    "rlhf_exp.engines.worker.__main__",
    "rlhf_exp.engines.worker.engine_line",
    "rlhf_exp.engines.worker.engine_model",
)
_TAIL = 15


class EngineProcess:
    """A worker, as a context manager that ends it.

    Args:
        engine: Its library, in messages.
        python: Its interpreter.
        log: File for its output; replaced.
        program: What it runs, see `program_of`.
    """

    def __init__(self, engine: str, python: str, log: Path, program: Sequence[Path]) -> None:
        self.engine, self.log = engine, log
        # It starts elsewhere. A link stays a link: it is what makes an environment.
        interpreter = Path(python).expanduser().absolute()
        here, there = socket.socketpair()
        self._line = Channel(Connection(here.detach()))
        with there, log.open("wb") as out:
            descriptor = there.fileno()
            try:
                self._process = subprocess.Popen(
                    [str(interpreter), "-I", *map(str, program), str(descriptor)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=worker_environment(os.environ),
                    cwd=log.parent,
                    pass_fds=(descriptor,),
                    start_new_session=True,
                )
            except OSError as error:
                self._line.close()
                raise UserError(f"engine.python={python}: cannot be started ({error})") from error

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it, and all that it has started; it has nothing left to save."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._line.close()

    def greet(self) -> dict[str, str]:
        """Wait until the worker is there; return the versions of its libraries."""
        versions: dict[str, str] = self.receive()["versions"]
        return versions

    def send(self, **message: object) -> None:
        """Answer; a message to a worker that is gone is lost, and `receive` says so."""
        self._line.send(**message)

    def receive(self) -> Message:
        """Wait for the worker's next message.

        Raises:
            UserError: It has failed or is gone.
        """
        try:
            message = self._line.receive()
        except EOFError as error:
            raise UserError(self._gone()) from error
        if message["kind"] == "failed":
            raise UserError(
                f"{self.engine} failed: {message['error']}\n\n{message['traceback'].rstrip()}\n\n"
                f"All that it printed is in {self.log}"
            )
        return message

    def _gone(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        said = "\n".join(lines) or "It printed nothing."
        what = f"{self.engine} has ended before its work was done ({how})"
        return f"{what}; its log, {self.log}:\n{said}"


def program_of(module: str) -> list[Path]:
    """Return the program of a worker, and the file that it imports: an engine's `module`."""
    return [_file_of(_WORKER[0]).parent, _file_of(module)]


def _file_of(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)
