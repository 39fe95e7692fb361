"""A W&B server on loopback, as far as runs and artifacts need one: it keeps what it is sent, for tests to look at.

with StubServer() as server: ... WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY ...
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

KEY = "0" * 40
OWNER = {"id": "owner", "name": "somebody"}


@dataclass
class StubRun:
    """What the server knows of a run; `lines` are those of its history by their number, as filestreams write them."""

    variables: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    summary: str | None = None
    exit_code: int | None = None
    num_starts: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    @property
    def config(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in json.loads(self.variables["config"]).items() if name[0] != "_"}


class StubServer:
    """Listens on a free port from the start. `hangs`: it takes connections and never answers."""

    def __init__(self, hangs: bool = False):
        self.runs: dict[str, StubRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.hangs, self.is_dead, self.changed = hangs, False, threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What points W&B here, with a key."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def __enter__(self) -> StubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """From now on connections are refused, and those that are open end without an answer."""
        if not self.is_dead:
            self.is_dead = True
            self._server.shutdown()
            self._server.server_close()

    def wait(self, condition: Any, timeout: float = 60.0) -> None:
        """Until `condition()` holds of what was sent; fails after `timeout` seconds."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout), "the server was never sent that"

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """Data for a GraphQL query; any other than those that runs need finds no project."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
        variables = query.get("variables") or {}
        answers = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "ServerFeaturesQuery": self._server_info,
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._run_files,
            "CreateArtifact": self._artifact,
            "CreateArtifactManifest": self._manifest,
            "CreateArtifactFiles": self._artifact_files,
            "CommitArtifact": self._commit,
        }
        name = found[1] if found else ""
        return {"data": answers[name](variables) if name in answers else {"project": None}}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What a filestream sends: lines of files from an offset on, and how the run ended."""
        kept = self.runs.setdefault(run, StubRun())
        for name, part in body.get("files", {}).items():
            if name == "wandb-history.jsonl":
                kept.lines |= {part["offset"] + i: line for i, line in enumerate(part["content"])}
            elif name == "wandb-summary.json":
                kept.summary = part["content"][-1]
        if body.get("complete"):
            kept.exit_code = body.get("exitcode")

    def _viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        lists: dict[str, Any] = {"teams": {"edges": []}, "apiKeys": {"edges": []}}
        return {"viewer": {"id": "viewer", "entity": OWNER["name"], "username": "somebody", "flags": "{}", **lists}}

    def _server_info(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, bucket = self.runs.get(variables["name"]), None
        if run is not None:
            tail = json.dumps([run.lines[number] for number in sorted(run.lines)][-1:])
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "displayName": run.variables.get("displayName"),
                "historyLineCount": len(run.lines),
                "logLineCount": 0,
                "eventsLineCount": 0,
                "historyTail": tail,
                "eventsTail": "[]",
                "summaryMetrics": run.summary or "{}",
                "config": run.variables.get("config") or "{}",
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "project", "name": variables.get("project"), "entity": OWNER, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables["id"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StubRun())
        run.variables |= {key: value for key, value in variables.items() if value is not None}
        run.num_starts += "host" in variables and variables["host"] is not None
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.variables.get("displayName"),
            "config": run.variables.get("config"),
            "historyLineCount": len(run.lines),
            "project": {"id": "project", "name": variables.get("project") or "crossdiff", "entity": OWNER},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append({**variables["input"], "committed": False})
        sequence = {"id": "sequence", "latestArtifact": None}
        return {
            "createArtifact": {
                "artifact": {"id": str(len(self.artifacts) - 1), "state": "PENDING", "artifactSequence": sequence}
            }
        }

    def _manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = f"manifest-{variables['artifactID']}"
        file = {"id": name, "uploadUrl": f"{self.url}/upload/{name}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def _artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in variables["input"]["artifactFiles"]:
            place = f"{file['artifactID']}/{file['name']}"
            node = {"storagePath": place, "uploadUrl": f"{self.url}/upload/artifact/{place}", "uploadHeaders": []}
            nodes.append({"node": {**node, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _commit(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(variables["artifactID"])]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact.get("digest")}}}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that are gone are nothing to speak of; anything else fails the test that asks for it."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


def _handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            body = self._body()
            with stub.changed:
                stub.files[self.path.partition("/upload/")[2]] = body
                stub.changed.notify_all()
            self._reply({})

        def do_POST(self) -> None:
            body, answer = self._body(), {}
            with stub.changed:
                if self.path == "/graphql":
                    answer = stub.answer(json.loads(body))
                elif self.path.endswith("/file_stream"):
                    stub.stream(self.path.split("/")[-2], json.loads(body))
                stub.changed.notify_all()
            self._reply(answer)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, value: dict[str, Any]) -> None:
            if stub.hangs:
                threading.Event().wait()
            if stub.is_dead:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
