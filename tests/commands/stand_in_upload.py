"""A hub on this machine that takes models: what huggingface_hub sends, no more than it needs.

Files of weights go by Git LFS's basic transfer, as the hub wants it of large files; small ones in
the commit itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class UploadHub:
    """What has arrived.

    Attributes:
        url: The address.
        created: Whether each repository is private, by its id.
        files: Content by name of each repository.
        commits: Commits in order.
    """

    def __init__(self, token: str) -> None:
        self.token, self.url = token, ""
        self.created: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self._large: dict[str, bytes] = {}

    def post(self, path: str, body: bytes) -> dict[str, Any] | None:
        """Answer a POST; `None`: no such address."""
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.created[name] = bool(given.get("private")) or given.get("visibility") == "private"
            self.files[name] = {}
            return {"url": f"{self.url}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repository = next((name for name in self.created if f"/{name}" in path), None)
        if repository is None:
            return None
        if path.endswith("/preupload/main"):
            return {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if "safetensors" in one["path"] else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ],
            }
        if path.endswith("/commit/main"):
            return self._commit(repository, body)
        return None

    def put(self, path: str, body: bytes) -> None:
        """Take a large file."""
        self._large[path.rpartition("/")[2]] = body

    def _commit(self, repository: str, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            given = json.loads(line)
            value = given["value"]
            if given["key"] == "file":
                content = base64.b64decode(value["content"])
                self.files[repository][value["path"]] = content
            elif given["key"] == "lfsFile":
                self.files[repository][value["path"]] = self._large[value["oid"]]
        self.commits.append(f"{len(self.commits):040x}")
        commit = self.commits[-1]
        return {"commitUrl": f"{self.url}/{repository}/commit/{commit}", "commitOid": commit}


@contextmanager
def upload_hub(token: str) -> Iterator[UploadHub]:
    """Run a stand-in that takes this token."""
    hub = UploadHub(token)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

        def do_POST(self) -> None:
            body = self._body()
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._answer(401, {"error": "Invalid credentials in Authorization header"})
            found = hub.post(self.path.partition("?")[0], body)
            return self._answer(404, {}) if found is None else self._answer(200, found)

        def do_PUT(self) -> None:
            hub.put(self.path, self._body())
            self._answer(200, {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
