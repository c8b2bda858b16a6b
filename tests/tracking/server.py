"""A stand-in for W&B's server on loopback, for tests with the real client.

It answers what wandb 0.31 asks for in recording a run, resuming it and sending it later
(`wandb sync`), and keeps all of it for assertions. It shows what the client sends, nothing about
W&B's service. An operation it does not know is an error to the client and is kept in `unknown`.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

ENTITY = "tester"
KEY = "0" * 40
Json = dict[str, Any]
STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events"}
FIELDS = {
    "displayName": "name",
    "groupName": "group",
    "jobType": "job_type",
    "tags": "tags",
    "project": "project",
}


@dataclass
class ReceivedRun:
    """What has arrived of one run.

    Attributes:
        run_id: Its id.
        project: Its project.
        group: Its group.
        job_type: Its job type.
        name: Its display name.
        tags: Its tags.
        config: Its config, nested.
        history: Its rows.
        summary: Its last summary.
        files: Its files.
        alerts: Titles and texts.
        upserts: How often it was announced; every start and every sync does so.
        exit_code: None while it runs.
        preempting: Whether it was ever marked as preempted.
    """

    run_id: str
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    summary: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    upserts: int = 0
    exit_code: int | None = None
    preempting: bool = False

    @property
    def internal_id(self) -> str:
        """The id that only the server and its client use."""
        return base64.b64encode(f"Run:v1:{self.run_id}".encode()).decode()

    def column(self, name: str) -> list[Any]:
        """Return the values of a metric, row by row, of the rows that have it."""
        return [row[name] for row in self.history if name in row]


@dataclass
class ReceivedArtifact:
    """What has arrived of one version of an artifact."""

    number: int
    name: str
    kind: str
    run_id: str
    metadata: Json
    aliases: list[str]
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """The stand-in; can be stopped and started again at the same address, keeping what it has.

    Attributes:
        runs: By id.
        artifacts: In order of arrival.
        unknown: Operations that were asked for and are not known.
    """

    def __init__(self) -> None:
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: list[ReceivedArtifact] = []
        self.unknown: list[str] = []
        self._lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._port = 0
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def run(self) -> ReceivedRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def start(self) -> Self:
        """Listen."""
        self._http = _Http(("127.0.0.1", self._port), _handler(self))
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Be gone, in the middle of whatever is being said."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        with self._lock:
            for connection in self._connections:
                connection.close()

    def opened(self, connection: socket.socket) -> None:
        """Remember a connection."""
        with self._lock:
            self._connections.add(connection)

    # GraphQL: one method for each operation, named as the client names it.

    def graphql(self, body: Json) -> Json:
        """Answer one operation."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", body["query"])
        name = found[1] if found else "?"
        operation = getattr(self, f"op_{name}", None)
        with self._lock:
            if operation is None:
                self.unknown.append(name)
                return {"errors": [{"message": f"the stand-in does not know {name}"}]}
            return {"data": operation(body.get("variables") or {})}

    def op_Viewer(self, given: Json) -> Json:
        viewer = {"id": "U1", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": ""}
        return {"viewer": {**viewer, "flags": "{}", "admin": False, "teams": {"edges": []}}}

    def op_GetDefaultEntity(self, given: Json) -> Json:
        return {"viewer": {"id": "U1", "entity": ENTITY}}

    def op_Run(self, given: Json) -> Json:
        run = self.runs.get(given["name"])
        if run is None:
            return {"project": {"run": None}}
        found = self._bucket(run) | {"projectId": "1", "tags": run.tags, "state": "finished"}
        found |= dict.fromkeys(("group", "jobType", "commit", "createdAt", "heartbeatAt", "notes"))
        found |= {"user": {}, "readOnly": False, "historyKeys": {}}
        found |= {"systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary)}
        return {"project": {"run": found}}

    def op_ServerFeaturesQuery(self, given: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def op_ServerInfo(self, given: Json) -> Json:
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}

    def op_UpsertBucket(self, given: Json) -> Json:
        by_internal = {run.internal_id: run.run_id for run in self.runs.values()}
        run_id = given.get("name") or by_internal[given["id"]]
        new = run_id not in self.runs
        run = self.runs.setdefault(run_id, ReceivedRun(run_id))
        for theirs, ours in FIELDS.items():
            if given.get(theirs) is not None:
                setattr(run, ours, given[theirs])
        if given.get("config") is not None:
            wrapped = json.loads(given["config"])
            run.config = {key: one["value"] for key, one in wrapped.items()}
        run.upserts += 1
        run.exit_code = None
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": new}}

    def op_RunResumeStatus(self, given: Json) -> Json:
        run = self.runs.get(given["name"])
        project = {"id": "P1", "name": given.get("project"), "entity": {"id": "E1", "name": ENTITY}}
        if run is None:
            return {"model": {**project, "bucket": None}}
        tails = {
            f"{name}Tail": json.dumps([json.dumps(row) for row in rows[-1:]])
            for name, rows in (("history", run.history), ("events", run.events))
        }
        bucket = self._bucket(run) | tails
        bucket |= {"summaryMetrics": json.dumps(run.summary), "logLineCount": 0}
        bucket |= {"eventsLineCount": len(run.events), "tags": run.tags, "notes": None}
        bucket |= {"wandbConfig": json.dumps(run.config.get("_wandb", {}))}
        return {"model": {**project, "bucket": bucket}}

    def op_RunStoppedStatus(self, given: Json) -> Json:
        return {"project": {"run": {"stopped": False}}}

    def op_NotifyScriptableRunAlert(self, given: Json) -> Json:
        run = self.runs[given["runName"]]
        run.alerts.append((given["title"], given["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def op_CreateRunFiles(self, given: Json) -> Json:
        run = given["run"]
        files = [{"name": name, "uploadUrl": self._at("run", run, name)} for name in given["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def op_RunFiles(self, given: Json) -> Json:
        run = self.runs[given["name"]]
        names = [name for name in run.files if name in given["fileNames"]]
        nodes = [
            {
                "id": name,
                "name": name,
                "sizeBytes": len(run.files[name]),
                "url": "",
                "directUrl": "",
            }
            | dict.fromkeys(("mimetype", "updatedAt", "md5"))
            for name in names
        ]
        found = {
            "edges": [{"node": node, "cursor": node["id"]} for node in nodes],
            "pageInfo": {"endCursor": None, "hasNextPage": False},
        }
        return {"project": {"run": {"fileCount": len(nodes), "files": found}}}

    def op_ArtifactType(self, given: Json) -> Json:
        return {"project": {"artifact": None}}

    def op_OrganizationCoreWeaveOrganizationID(self, given: Json) -> Json:
        return {"entity": {"organization": None}}

    def op_CreateArtifact(self, given: Json) -> Json:
        given = given.get("input", given)
        names = given.get("artifactCollectionNames") or [given.get("artifactCollectionName")]
        metadata = json.loads(given.get("metadata") or "{}")
        aliases = [one["alias"] for one in given.get("aliases") or []]
        number = len(self.artifacts)
        artifact = ReceivedArtifact(
            number, names[0], given["artifactTypeName"], given.get("runName"), metadata, aliases
        )
        self.artifacts.append(artifact)
        latest = {"id": str(number), "versionIndex": 0}
        sequence = {"id": f"S{names[0]}", "latestArtifact": latest}
        answer = {"id": str(number), "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": answer}}

    def op_CreateArtifactManifest(self, given: Json) -> Json:
        return {"createArtifactManifest": self._manifest(given["artifactID"])}

    def op_UpdateArtifactManifest(self, given: Json) -> Json:
        number = given["artifactManifestID"].removeprefix("M")
        return {"updateArtifactManifest": self._manifest(number)}

    def op_CreateArtifactFiles(self, given: Json) -> Json:
        edges = []
        for one in given.get("artifactFiles") or given["input"]["artifactFiles"]:
            number, name = one["artifactID"], one["name"]
            node = {"id": "F", "name": name, "displayName": name, "storagePath": name}
            node |= {"uploadUrl": self._at("artifact", number, name), "uploadHeaders": []}
            node |= {"uploadMultipartUrls": None, "artifact": {"id": number}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def op_CommitArtifact(self, given: Json) -> Json:
        artifact = self.artifacts[int(given.get("input", given)["artifactID"])]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": str(artifact.number), "digest": "D"}}}

    # What else the client sends.

    def stream(self, run_id: str, body: Json) -> Json:
        """Take rows of history and system metrics, the summary and the end of a run."""
        with self._lock:
            run = self.runs[run_id]
            for name, chunk in (body.get("files") or {}).items():
                lines, offset = chunk["content"], chunk.get("offset", 0)
                if name == "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
                elif name in STREAMS:
                    rows = getattr(run, STREAMS[name])
                    rows[offset : offset + len(lines)] = map(json.loads, lines)
            if body.get("preempting"):
                run.preempting = True
            if body.get("complete"):
                run.exit_code = body.get("exitcode") or 0
        return {"exitcode": None, "limits": {}}

    def upload(self, path: str, content: bytes) -> None:
        """Take a file of a run, or of an artifact."""
        kind, whose, name = path.removeprefix("/upload/").split("/", 2)
        with self._lock:
            if kind == "run":
                self.runs[whose].files[name] = content
            elif kind == "manifest":
                self.artifacts[int(whose)].manifest = json.loads(content)
            else:
                self.artifacts[int(whose)].files[name] = content

    def _at(self, kind: str, whose: str, name: str) -> str:
        return f"{self.url}/upload/{kind}/{whose}/{name}"

    def _manifest(self, number: str) -> Json:
        name = "wandb_manifest.json"
        file = {"id": "F", "name": name, "displayName": name, "uploadHeaders": []}
        file |= {"uploadUrl": self._at("manifest", number, name)}
        return {"artifactManifest": {"id": f"M{number}", "file": file}}

    def _bucket(self, run: ReceivedRun) -> Json:
        project = {"id": "P1", "name": run.project, "entity": {"id": "E1", "name": ENTITY}}
        wrapped = {key: {"value": value} for key, value in run.config.items()}
        return {
            "id": run.internal_id,
            "name": run.run_id,
            "displayName": run.name,
            "description": "",
            "config": json.dumps(wrapped),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": project,
        }


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients hang up as they please
            super().handle_error(request, client_address)


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.opened(self.connection)

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                self._answer(server.graphql(json.loads(body)))
            elif self.path.endswith("/file_stream"):
                self._answer(server.stream(self.path.split("/")[-2], json.loads(body)))
            else:
                server.unknown.append(self.path)
                self._answer({}, 404)

        def do_PUT(self) -> None:
            server.upload(self.path, self._body())
            self._answer({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            packed = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(body) if packed else body

        def _answer(self, content: Json, code: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
