"""Connections between the process that leads and the others: JSON messages, and signs of life.

A connection ends with the process at its other end, however that ends. So whoever listens learns of
a death at once, without any collective and without a time-out, even while its own main thread is
stuck in one.
"""

from __future__ import annotations

import json
import secrets
import socket
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

Message = dict[str, Any]
JOIN_S = 600.0
"""How long processes that were started together may take to find each other."""
SILENCE_S = 15
"""After so long without an answer of the other machine's kernel, the machine is gone."""
_HELLO_S, _HELLO_BYTES = 10.0, 1000
_WHERE = "leader"


class Channel:
    """One end of a connection.

    Args:
        connection: A pipe's or a socket's end.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        """Send a message; one to a process that is gone is lost."""
        with suppress(OSError):
            self.connection.send_bytes(json.dumps(message, default=float).encode())

    def receive(self, longest: int | None = None) -> Message:
        """Wait for a message.

        Args:
            longest: Bytes of the longest message to accept.

        Raises:
            EOFError: The other end is gone.
        """
        try:
            message: Message = json.loads(self.connection.recv_bytes(longest))
        except OSError as error:
            raise EOFError from error
        return message

    def fileno(self) -> int:
        """Return what `multiprocessing.connection.wait` waits for."""
        return self.connection.fileno()

    def close(self) -> None:
        """Hang up."""
        self.connection.close()


def await_members(store: Store, processes: int) -> dict[int, Channel]:
    """Return a line to each of the other processes, by rank; called by rank 0.

    Args:
        store: What all processes share.
        processes: How many there are, this one included.

    Raises:
        UserError: One does not come.
    """
    found: dict[int, Channel] = {}
    secret = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=processes) as server:
        server.settimeout(JOIN_S)
        store.set(_WHERE, json.dumps([server.getsockname()[1], secret]))
        while len(found) < processes - 1:
            try:
                end, _ = server.accept()
            except TimeoutError as error:
                missing = sorted(set(range(1, processes)) - found.keys())
                raise UserError(
                    f"the processes of rank {missing} have not come within {JOIN_S:.0f} s; all "
                    "of them must run the same command"
                ) from error
            line = Channel(_kept_alive(end))
            rank = _presented(line, secret)
            if rank is None:
                line.close()
            else:
                found[rank] = line
    return found


def call_leader(store: Store, address: str, rank: int) -> Channel:
    """Return a line to rank 0; called by every other process."""
    port, secret = json.loads(store.get(_WHERE))
    line = Channel(_kept_alive(socket.create_connection((address, port), timeout=JOIN_S)))
    line.send(rank=rank, secret=secret)
    return line


def _presented(line: Channel, secret: str) -> int | None:
    """Return the rank of who has called; `None` for a stranger: anybody can find a port."""
    with suppress(EOFError, ValueError, KeyError, TypeError):
        if line.connection.poll(_HELLO_S):
            hello = line.receive(longest=_HELLO_BYTES)
            if secrets.compare_digest(hello["secret"], secret):
                return int(hello["rank"])
    return None


def _kept_alive(end: socket.socket) -> Connection:
    """Return a socket as a connection that ends when the other machine stops answering."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    # Unanswered data count too: without it they are sent again for a quarter of an hour.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.settimeout(None)
    return Connection(end.detach())
