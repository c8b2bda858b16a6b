"""A socket to listen on, and serving an application there until the process is interrupted."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from typing import TYPE_CHECKING

from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_LAST_PORT = 65_535


def need_server(command: str, extra: str) -> None:
    """Check that the packages of a web server are installed.

    Args:
        command: The command of `rlhf-exp`, for the error.
        extra: The extra of this package that installs a server.

    Raises:
        UserError: Starlette or uvicorn is missing.
    """
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"{command}: {' and '.join(missing)} not installed, which it needs to serve: "
            f"`pip install {' '.join(missing)}` (extra `{extra}`)"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to host and port; port 0 takes a free one.

    Raises:
        UserError: the address is in use or cannot be listened on.
    """
    if not 0 <= port <= _LAST_PORT:
        raise UserError(f"--port {port}: expected 0 to {_LAST_PORT}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        # A server that was killed leaves connections in TIME_WAIT; its successor may start at once.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}; name "
            "another port (--port 0 takes a free one)"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Return whether only this machine can connect."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def serve(app: ASGIApp, bound: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    import uvicorn

    # No access log: addresses may hold tokens.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[bound])
