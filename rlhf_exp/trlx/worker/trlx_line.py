"""The worker's end of the connection: JSON messages, and the sign that nobody is left to work for.

It needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

Message = dict[str, Any]


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
