"""A local server of the Messages API: it checks requests as the API does, and misbehaves on demand.

    python -m tests.analysis.messages_stub --port 8080 --latency 0.2

What it answers is made from the schema of the request. `plan(prompt, nth)` names what happens to the nth request with
one content (from 0): "answer", or one of the FAULTS, or "status 429 retry-after 0.2" (with _ for blanks in a header).
`paid` counts, by the content of the request, the answers that were made, each of which a real server charges for.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from analysis.json_lines import json_text
from tests.analysis.messages_rules import CUSTOM_ID, MODELS, Refused, by_schema, check, content_of, message_of

FAULTS = (
    *("timeout", "reset", "reset midway", "refusal", "thinking", "truncated", "malformed", "not json", "unknown"),
    *("expired", "canceled", "errored", "errored request", "missing"),
)
Plan = Callable[[str, int], str]


class MessagesStub:
    """`with MessagesStub(...) as stub:` serves at `stub.url` from threads of this process."""

    def __init__(
        self,
        plan: Plan = lambda prompt, nth: "answer",
        answer: Callable[[dict[str, Any]], Any] | None = None,
        latency: float = 0.0,
        batch_s: float = 0.0,
        port: int = 0,
        local: bool = False,
    ) -> None:
        # `local`: like a server of local models, without a key, batches, counting, or models by name.
        self.plan, self.answer = plan, answer or by_schema
        self.latency, self.batch_s, self.local = latency, batch_s, local
        self.paid: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.busy = self.most_busy = 0
        self.batches: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self._systems: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"stub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that were killed
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> MessagesStub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fate(self, body: dict[str, Any]) -> str:
        """What is to happen to a request, counting it."""
        content = content_of(body)
        with self.lock:
            nth = self.seen[content]
            self.seen[content] += 1
            self.bodies.append(body)
            self.times.setdefault(content, []).append(time.monotonic())
        return self.plan(body["messages"][-1]["content"], nth)

    def respond(self, body: dict[str, Any], fate: str) -> dict[str, Any]:
        """The message that answers a request, charged."""
        system = json.dumps(body.get("system", ""))
        with self.lock:
            self.paid[content_of(body)] += 1
            cached = system in self._systems
            self._systems.add(system)
            number = sum(self.paid.values())
        return message_of(body, fate, self.answer(body), number, cached)

    def start_batch(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [request["custom_id"] for request in requests]
        if len(set(ids)) < len(ids) or not all(CUSTOM_ID.fullmatch(name) for name in ids):
            raise Refused(400, "requests: custom_id must be unique and match ^[a-zA-Z0-9_-]{1,64}$")
        for request in requests:
            check(request["params"], self.local)
        with self.lock:
            name = f"msgbatch_{len(self.batches):04d}"
            batch = {"id": name, "requests": requests, "created": time.time(), "results": None}
            self.batches[name] = batch
        return self.describe_batch(batch)

    def describe_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The state of a batch; its requests are answered when it ends."""
        ended = time.time() >= batch["created"] + self.batch_s
        with self.lock:
            due = ended and batch["results"] is None
            if due:
                batch["results"] = []
        if due:
            batch["results"] = self._results(batch["requests"])
        kinds = Counter(result["result"]["type"] for result in batch["results"] or ())
        counts = {kind: kinds[kind] for kind in ("succeeded", "errored", "canceled", "expired")}
        counts["processing"] = 0 if ended else len(batch["requests"])
        made = datetime.fromtimestamp(batch["created"], UTC)
        return {
            "id": batch["id"],
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts,
            "created_at": made.isoformat(),
            "expires_at": (made + timedelta(days=1)).isoformat(),
            "results_url": f"{self.url}/v1/messages/batches/{batch['id']}/results" if ended else None,
        }

    def _results(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fates = [(request, self.fate(request["params"])) for request in requests]
        results = [
            {"custom_id": request["custom_id"], "result": self._result(request["params"], fate)}
            for request, fate in fates
            if fate != "missing"
        ]
        random.Random(0).shuffle(results)
        return results

    def _result(self, params: dict[str, Any], fate: str) -> dict[str, Any]:
        if fate in ("expired", "canceled"):
            return {"type": fate}
        if fate.startswith("errored"):
            kind = "invalid_request_error" if fate == "errored request" else "api_error"
            return {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": "as planned"}}}
        return {"type": "succeeded", "message": self.respond(params, fate)}


class Handler(BaseHTTPRequestHandler):
    """One connection. `stub` is set by the server that it is made for."""

    stub: MessagesStub
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: else the kernel holds the second back until the first is acknowledged.
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def _handle(self, work: Callable[[], None]) -> None:
        self.path, _, self._query = self.path.partition("?")
        self.stub.calls[f"{self.command} {self.path}"] += 1
        try:
            if not self.stub.local and not (self.headers.get("x-api-key") or self.headers.get("authorization")):
                raise Refused(401, "authentication is required")
            if not self.headers.get("anthropic-version"):
                raise Refused(400, "anthropic-version: header is required")
            work()
        except Refused as error:
            self._error(error.status, str(error))

    def _get(self) -> None:
        parts = self.path.strip("/").split("/")[1:]
        if parts[0] == "models":
            self._models(parts[1:])
        elif parts[:2] == ["messages", "batches"] and not self.stub.local:
            self._batches(parts[2:])
        else:
            raise Refused(404, "Not Found")

    def _models(self, name: list[str]) -> None:
        infos = {model: _info(model, state) for model, state in MODELS.items()}
        if name and (name[0] not in infos or self.stub.local):
            raise Refused(404, f"model: {name[0]}")
        listed = [{"id": "local-model", "object": "model"}] if self.stub.local else list(infos.values())
        self._json(infos[name[0]] if name else {"data": listed, "has_more": False, "first_id": None, "last_id": None})

    def _batches(self, parts: list[str]) -> None:
        known = self.stub.batches
        if not parts:
            newest = [self.stub.describe_batch(batch) for batch in reversed(list(known.values()))]
            self._json({"data": newest, "has_more": False, "first_id": None, "last_id": None})
        elif parts[0] not in known:
            raise Refused(404, f"batch: {parts[0]}")
        elif parts[1:] == ["results"]:
            lines = (json_text(result) + "\n" for result in known[parts[0]]["results"])
            self._send(200, "".join(lines).encode(), "application/x-jsonl")
        else:
            self._json(self.stub.describe_batch(known[parts[0]]))

    def _post(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/messages":
            self._message(body)
        elif self.path == "/v1/messages/batches" and not self.stub.local:
            described = self.stub.start_batch(body["requests"])
            fate = self.stub.plan("create batch", self.stub.calls["POST /v1/messages/batches"] - 1)
            self._json(described) if fate == "answer" else self._misbehave(fate)
        elif self.path == "/v1/messages/count_tokens" and not self.stub.local:
            self._json({"input_tokens": (len(json.dumps(body["messages"])) + len(json.dumps(body["system"]))) // 4})
        else:
            raise Refused(404, "Not Found")

    def _message(self, body: dict[str, Any]) -> None:
        check(body, self.stub.local)
        with self.stub.lock:
            self.stub.busy += 1
            self.stub.most_busy = max(self.stub.most_busy, self.stub.busy)
        try:
            fate = self.stub.fate(body)
            time.sleep(self.stub.latency)
            if fate.startswith("status ") or fate in ("timeout", "reset"):
                self._misbehave(fate)
                return
            message = self.stub.respond(body, fate)
        finally:
            with self.stub.lock:
                self.stub.busy -= 1
        if fate == "reset midway":
            self._send(200, json.dumps(message).encode(), "application/json", cut=True)
            self._reset()
        else:
            self._json(message)

    def _misbehave(self, fate: str) -> None:
        if fate == "timeout":
            time.sleep(3.0)
            self.close_connection = True
        elif fate == "reset":
            self._reset()
        else:
            words = fate.split()
            values = (word.replace("_", " ") for word in words[3::2])
            self._error(int(words[1]), "as planned", dict(zip(words[2::2], values, strict=True)))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status, "api_error")
        body = {"type": "error", "error": {"type": kind, "message": message}}
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(
        self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        with suppress(OSError):  # the client may have been killed
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.wfile.flush()


def _info(model: str, state: str) -> dict[str, Any]:
    dates = {"created_at": "2026-01-01T00:00:00Z", "retires_at": "2026-11-30T00:00:00Z" if state != "active" else None}
    return {"id": model, "type": "model", "display_name": model, "lifecycle": state, **dates}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--local", action="store_true")
    arguments = parser.parse_args()
    with MessagesStub(latency=arguments.latency, port=arguments.port, local=arguments.local) as stub:
        print(stub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
