"""Channels of JSON messages between the leader and the other processes of a run.

A channel closes with the process at its other end, however that process ends. So its reader notices
a death at once, without a collective and without a time-out, even while its own main thread is
stuck in a collective.
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
"""Time in which processes that were started together must find each other."""
SILENCE_S = 15
"""A machine whose kernel has not answered for so long is gone."""
_HELLO_S, _HELLO_BYTES = 10.0, 1000
_ADDRESS_KEY = "leader"


class Channel:
    """One end of a connection.

    Args:
        connection: A pipe's or a socket's end.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, **message: Any) -> None:  # noqa: ANN401 - JSON values
        """Send a message; a message to a process that is gone is lost."""
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
        """Return the file descriptor, for `multiprocessing.connection.wait`."""
        return self.connection.fileno()

    def close(self) -> None:
        """Close the channel."""
        self.connection.close()


def accept_workers(store: Store, processes: int) -> dict[int, Channel]:
    """Return a channel to each of the other processes, by rank; called by rank 0.

    Args:
        store: The store that all processes share.
        processes: Number of processes, this one included.

    Raises:
        UserError: A process does not connect in time.
    """
    channels: dict[int, Channel] = {}
    secret = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=processes) as server:
        server.settimeout(JOIN_S)
        store.set(_ADDRESS_KEY, json.dumps([server.getsockname()[1], secret]))
        while len(channels) < processes - 1:
            try:
                connected, _ = server.accept()
            except TimeoutError as error:
                missing = sorted(set(range(1, processes)) - channels.keys())
                raise UserError(
                    f"the processes of rank {missing} have not come within {JOIN_S:.0f} s; all "
                    "of them must run the same command"
                ) from error
            channel = Channel(_with_keepalive(connected))
            rank = _authenticated_rank(channel, secret)
            if rank is None:
                channel.close()
            else:
                channels[rank] = channel
    return channels


def connect_to_leader(store: Store, address: str, rank: int) -> Channel:
    """Return a channel to rank 0; called by every other process."""
    port, secret = json.loads(store.get(_ADDRESS_KEY))
    channel = Channel(_with_keepalive(socket.create_connection((address, port), timeout=JOIN_S)))
    channel.send(rank=rank, secret=secret)
    return channel


def _authenticated_rank(channel: Channel, secret: str) -> int | None:
    """Return the rank at the other end; `None` for a stranger: anybody can find a port."""
    with suppress(EOFError, ValueError, KeyError, TypeError):
        if channel.connection.poll(_HELLO_S):
            hello = channel.receive(longest=_HELLO_BYTES)
            if secrets.compare_digest(hello["secret"], secret):
                return int(hello["rank"])
    return None


def _with_keepalive(connected: socket.socket) -> Connection:
    """Return a socket as a connection that closes when the other machine stops answering."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    # Unanswered data count too: without it they are sent again for a quarter of an hour.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.settimeout(None)
    return Connection(connected.detach())
