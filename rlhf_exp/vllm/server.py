"""vLLM servers: a process of this machine, in an interpreter of its own, or one at an address.

Both are `worker/vllm_worker.py`. A process of this machine ends with its trainer, however that
ends, and reads weights from a file that the trainer names; a server at an address is sent them.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

import torch

from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import worker_environment
from rlhf_exp.redaction import note_secret
from rlhf_exp.vllm.cuda_handles import Named, chunks, handle_of

log = logging.getLogger(__name__)

# By name, so that the code of the worker counts as code of the stage.
WORKER_MODULE = "rlhf_exp.vllm.worker.vllm_worker"
KEY_VARIABLE = "RLHF_EXP_VLLM_KEY"
ENVIRONMENT = {
    # One process that can be looked into, and ends at once.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What every server's environment has."""
START_S = 300.0
"""Time in which a process of this machine must listen; importing vLLM is not part of it."""
ABSENCE_S = 900.0
"""Time that a server at an address may be gone, such as while it is started again."""
_RETRY_S = 2.0
_END_S = 2.0
_LEAVE_S = 5.0
_SHOWN_LINES = 15
_BLOCK = 1 << 24
CHUNK_BYTES = 1 << 30
"""Bytes of weights that are handed over at once on a GPU: where they are cast, so many more."""


def program() -> Path:
    """Return the file of the worker's program."""
    spec = find_spec(WORKER_MODULE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


class ServerGone(Exception):
    """A server is gone, or its engine has failed: a new one can do the work again."""


class Server(Protocol):
    """A vLLM server.

    Attributes:
        name: Of the server, in messages.
        died: How often it had to be started again, or was away.
    """

    name: str
    died: int

    def start(self) -> None:
        """See to it that there is a server; one that runs is left alone."""

    def ask(self, route: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
        """Send a request and wait for the answer.

        Raises:
            ServerGone: The server has ended or failed.
            UserError: It refuses the request.
        """

    def push(self, path: Path, **names: str) -> None:
        """Hand over a safetensors file of weights; raises like `ask`."""

    @property
    def reads_gpu(self) -> bool:
        """Whether it can read tensors on the trainer's GPU."""
        ...

    def push_tensors(self, tensors: Iterable[Named], **names: str) -> None:
        """Hand over weights on the trainer's GPU, where they are; raises like `ask`."""

    def restart(self, reason: ServerGone) -> None:
        """Start the server again after a failure, or wait until it is back.

        Raises:
            UserError: It does not come back.
        """

    def close(self, owner: str) -> None:
        """End it, or leave it to other runs."""


class LocalServer:
    """A server in a process of this machine.

    Args:
        python: Its interpreter.
        log_file: File for its output; what earlier processes wrote stays.
        variables: Environment variables, on top of this process's.
        trainer_gpu: Number of the trainer's GPU among those that the server sees; `None`: it sees
            none.
    """

    def __init__(
        self,
        python: str,
        log_file: Path,
        variables: Mapping[str, str],
        trainer_gpu: int | None = None,
    ) -> None:
        self._trainer_gpu = trainer_gpu
        self.name, self.log_file, self.died = "vLLM", log_file, 0
        self._python, self._variables = Path(python).expanduser().absolute(), variables
        self._key = os.urandom(16).hex()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._port = 0

    def start(self) -> None:
        """See `Server`."""
        if self._process is not None:
            return
        here, there = socket.socketpair()
        variables = worker_environment(os.environ) | ENVIRONMENT
        variables |= {"VLLM_LOGGING_LEVEL": "WARNING", **self._variables, KEY_VARIABLE: self._key}
        worker = str(program())
        command = [str(self._python), "-I", worker, "--pipe", str(there.fileno())]
        with there, self.log_file.open("ab") as out:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    cwd=self.log_file.parent,
                    pass_fds=(there.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                here.close()
                message = f"ppo.generation.python={self._python}: cannot be started ({error})"
                raise UserError(message) from error
        self._line = here

    def ask(self, route: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401
        """See `Server`."""
        self._connect()
        body = json.dumps(request).encode()
        try:
            return _exchange("127.0.0.1", self._port, route, self._key, body, self.name)
        except ServerGone as gone:
            raise ServerGone(self._gone(str(gone))) from gone

    def push(self, path: Path, **names: str) -> None:
        """See `Server`."""
        query = urlencode({**names, "path": str(path)})
        self.ask(f"/weights?{query}")

    @property
    def reads_gpu(self) -> bool:
        """See `Server`."""
        return self._trainer_gpu is not None

    def push_tensors(self, tensors: Iterable[Named], **names: str) -> None:
        """See `Server`."""
        groups = iter(chunks(tensors, CHUNK_BYTES))
        following, part = next(groups, None), 0
        while following is not None:
            # Kept until the server has read them: a handle keeps nothing alive.
            group, following = following, next(groups, None)
            torch.cuda.current_stream().synchronize()  # they may have been cast just now
            handles = [handle_of(name, tensor) for name, tensor in group]
            where = {"part": part, "last": following is None, "device": self._trainer_gpu}
            self.ask("/handles", handles=handles, **where, **names)
            part += 1

    def restart(self, reason: ServerGone) -> None:
        """See `Server`."""
        self.died += 1
        log.warning("vLLM is started again: %s", reason)
        self._end()
        self.start()

    def close(self, owner: str) -> None:
        """See `Server`: what it is doing is given up."""
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._line is not None:
            self._line.close()
            self._line = None
        self._port = 0

    @property
    def pid(self) -> int | None:
        """Number of the process, if it runs."""
        return None if self._process is None else self._process.pid

    def _connect(self) -> None:
        """Wait until a new process says where it listens."""
        assert self._line is not None, "it is started first"
        if self._port:
            return
        self._line.settimeout(START_S)
        try:
            said = self._line.recv(32).decode().strip()
        except OSError as error:
            raise ServerGone(self._gone(f"it does not listen ({error})")) from error
        if not said:
            raise ServerGone(self._gone("it has ended before it listened"))
        self._port = int(said)

    def _gone(self, reason: str) -> str:
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # its connections end a moment before it does
                code = self._process.wait(_END_S)
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            reason = f"it has ended ({how})"
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(lines[-_SHOWN_LINES:]) or "It printed nothing."
        return f"{reason}; its log, {self.log_file}:\n{said}"


class RemoteServer:
    """A server at an address, which something else starts, and starts again where it ends.

    Args:
        url: Its address, such as `http://node7:8500`.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        assert parts.port is not None, url
        self.name, self.died = url, 0
        self._host, self._port = parts.hostname, parts.port
        self._key = os.environ.get(KEY_VARIABLE)
        note_secret(self._key)

    def start(self, patience_s: float = ABSENCE_S) -> None:
        """See `Server`: wait until it answers, for so many seconds.

        Raises:
            UserError: It does not, or something else is at this address.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                status = _exchange(self._host, self._port, "/status", self._key, None, self.name)
                break
            except ServerGone as gone:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"ppo.generation.urls: {self.name} did not answer for {patience_s:.0f} s "
                        f"({gone}); start it there with `rlhf-exp vllm-server`"
                    ) from gone
                time.sleep(_RETRY_S)
        if status.get("service") != "rlhf-exp vllm":
            raise UserError(
                f"ppo.generation.urls: at {self.name} is no server of `rlhf-exp vllm-server`"
            )

    def ask(self, route: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401
        """See `Server`."""
        body = json.dumps(request).encode()
        return _exchange(self._host, self._port, route, self._key, body, self.name)

    def push(self, path: Path, **names: str) -> None:
        """See `Server`."""
        found, checksum = 0, 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found, checksum = found + len(block), zlib.crc32(block, checksum)
        query = urlencode({**names, "checksum": str(checksum)})
        route = f"/weights?{query}"
        _exchange(self._host, self._port, route, self._key, path, self.name)

    @property
    def reads_gpu(self) -> bool:
        """See `Server`."""
        return False

    def push_tensors(self, tensors: Iterable[Named], **names: str) -> None:
        """See `Server`."""
        raise AssertionError("another machine's GPU cannot be read")

    def restart(self, reason: ServerGone) -> None:
        """See `Server`."""
        self.died += 1
        log.warning("%s is waited for: %s", self.name, reason)
        time.sleep(_RETRY_S)
        self.start()

    def close(self, owner: str) -> None:
        """See `Server`: one that is busy is not waited for."""
        body = json.dumps({"owner": owner}).encode()
        with suppress(ServerGone, UserError):
            args = (self._host, self._port, "/leave", self._key, body, self.name)
            _exchange(*args, timeout_s=_LEAVE_S)


def _exchange(
    host: str,
    port: int,
    route: str,
    key: str | None,
    body: bytes | Path | None,
    name: str,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Send a request and return the answer; `body` may be a file's path, or `None` for a GET.

    Raises:
        ServerGone: There is no answer, or the engine behind it has failed.
        UserError: The request is refused.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        connection.connect()
        _notice_a_dead_machine(connection.sock)
        if isinstance(body, Path):
            headers["Content-Length"] = str(body.stat().st_size)
            with body.open("rb") as file:
                connection.request("POST", route, file, headers)
        else:
            connection.request("GET" if body is None else "POST", route, body, headers)
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerGone(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    # 409: it has lost what it had, as one that was started again has.
    if response.status >= 500 or response.status == 409:
        raise ServerGone(str(answer.get("error")))
    if response.status != 200:
        raise UserError(f"{name}: {answer.get('error')}")
    return answer


def _notice_a_dead_machine(connection: socket.socket) -> None:
    """Let the kernel ask the other machine whether it is there: an answer may take minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
