"""The worker's end of the connection: JSON messages, and the sign that nobody is left to work for.

What every engine's worker needs beside its library: it needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import threading
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

Message = dict[str, Any]


class Stopped(BaseException):
    """There is no more to do."""


class WorkerChannel:
    """The connection to the process that started this one, which ends with it.

    Args:
        fd: Its file descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._answers: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self._answers.put(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(1)

    def send(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        """Send a message."""
        self._connection.send_bytes(json.dumps(message).encode())

    def ask(self, **message: Any) -> Message:  # noqa: ANN401 - JSON values
        """Send a message and wait for the answer."""
        self.send(**message)
        return self._answers.get()


def rows(path: str) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def peak_resident_bytes() -> int:
    """Return the most memory that this process has used at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def until_ended(
    ids: list[int], end_ids: Collection[int], decode: Callable[[list[int]], str], stops: list[str]
) -> list[int]:
    """Return a response up to its end token or stop string, after which a library drew on.

    Args:
        ids: The tokens.
        end_ids: The end tokens.
        decode: Makes text of tokens.
        stops: The stop strings.
    """
    ends = [place for place, token in enumerate(ids) if token in end_ids]
    if ends:
        ids = ids[: ends[0] + 1]
    whole = decode(ids)
    stops = [stop for stop in stops if stop in whole]
    for count in range(1, len(ids) if stops else 0):
        text = decode(ids[:count])
        if any(stop in text for stop in stops):
            return ids[:count]
    return ids
