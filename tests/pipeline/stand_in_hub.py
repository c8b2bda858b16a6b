"""A hub on this machine: serves one revision of some repositories to huggingface_hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    repositories: Mapping[str, Mapping[str, bytes]] = {}
    asked: list[str] = []  # noqa: RUF012 - one server at a time

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        self.asked.append(f"{self.command} {self.path}")

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        for name, files in self.repositories.items():
            api = f"api/models/{name}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": file} for file in files]
                return self._json({"id": name, "sha": COMMIT, "siblings": siblings}, body)
            if path.startswith(f"{api}/tree/"):
                return self._json([_entry(file, files[file]) for file in files], body)
            for file, content in files.items():
                if path == f"{name}/resolve/{COMMIT}/{file}":
                    etag = hashlib.sha1(content).hexdigest()
                    return self._send(200, content, body, ETag=f'"{etag}"')
        return self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def _json(self, content: object, body: bool) -> None:
        self._send(200, json.dumps(content).encode(), body)

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


@contextmanager
def stand_in_hub(
    repositories: Mapping[str, Mapping[str, bytes]],
) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories; yield the address and the list of what has been asked."""
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
