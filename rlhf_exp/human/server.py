"""Serving a study until it is interrupted."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn

from rlhf_exp.errors import UserError
from rlhf_exp.human.app import make_app
from rlhf_exp.human.study import Study

_LAST_PORT = 65_535


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to host and port; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had.
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


def serve(study: Study, bound: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    # No access log: the addresses hold the tokens.
    config = uvicorn.Config(
        make_app(study), log_level="warning", access_log=False, server_header=False
    )
    uvicorn.Server(config).run(sockets=[bound])
