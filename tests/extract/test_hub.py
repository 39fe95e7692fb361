"""A dataset of the hub that moves on while tokens are made, against a local server that speaks the hub's protocol."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.command import compose
from extract.config import ExtractSettings
from extract.manifest import Manifest

FIRST, SECOND = "a" * 40, "b" * 40
FILE = "train.jsonl"
COMMITS = {
    commit: b"".join(json.dumps({"text": f"{word} document number {i}"}).encode() + b"\n" for i in range(200))
    for commit, word in ((FIRST, "an early"), (SECOND, "another"))
}


class Hub(http.server.ThreadingHTTPServer):
    """One dataset, org/data, of two commits; `main` is the one that it stands at. `asked` are the paths asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.main = FIRST
        self.asked: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


class Answer(http.server.BaseHTTPRequestHandler):
    """What the hub says of a dataset, its files, and a range of one of them, to those with the token."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        about = re.fullmatch(r"/api/datasets/org/data(?:/(revision|tree)/(\w+))?", path)
        file = re.fullmatch(rf"/datasets/org/data/resolve/(\w+)/{FILE}", path)
        if self.headers["Authorization"] != "Bearer hf_x":
            self._send(401, b"")
        elif about:
            commit = self.server.main if about[2] in (None, "main") else about[2]
            files = [{"type": "file", "oid": commit, "size": len(COMMITS[commit]), "path": FILE}]
            dataset = {"id": "org/data", "sha": commit, "siblings": [{"rfilename": FILE}], "tags": []}
            self._send(200, json.dumps(files if about[1] == "tree" else dataset).encode())
        elif file:
            self._send_file(COMMITS[file[1]], {"X-Repo-Commit": file[1], "ETag": f'"{file[1]}"'})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or f"bytes=0-{len(data)}")
        assert wanted
        part = data[int(wanted[1]) : int(wanted[2]) + 1]
        place = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        self._send(206, part, {**headers, "Content-Range": place, "Accept-Ranges": "bytes"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ran(hub: Hub, overrides: list[str], home: Path, token: str = "hf_x", module: str = "tokens") -> str:
    """The standard error of a command in a process of its own: the hub's address is read when it starts."""
    environment = {**os.environ, **hub.environment, "HF_HOME": str(home), "HF_TOKEN": token}
    command = [sys.executable, "-m", f"extract.{module}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stderr


@pytest.mark.slow
def test_tokens_are_of_one_commit_though_the_dataset_moves_on(study: list[str], hub: Hub, tmp_path: Path):
    overrides = [*study, "corpus.sources=[{path: org/data}]"]
    folder = compose(ExtractSettings, overrides).tokens_folder
    ran(hub, overrides, tmp_path / "home")
    whole = Manifest.read(folder)
    expected = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    assert whole.documents == 200 and len(expected) > 12
    assert whole.settings["corpus"]["sources"][0]["commit"] == FIRST

    hub.main = SECOND
    (folder / "manifest.json").unlink()
    for name in sorted(expected)[6:]:
        (folder / name).unlink()
    ran(hub, overrides, tmp_path / "home")
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected
    assert Manifest.read(folder).content_sha256() == whole.content_sha256()

    os.truncate(folder / "shard-00003.tar", 1000)
    ran(hub, [*overrides, "repair=true"], tmp_path / "home", module="verify")
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected

    hub.asked.clear()
    assert "error" not in ran(hub, overrides, tmp_path / "home")
    assert not [path for path in hub.asked if "org/data" in path]  # what is finished needs no hub

    fresh = [*overrides, f"store={tmp_path / 'fresh'}"]
    ran(hub, fresh, tmp_path / "home")
    assert Manifest.read(tmp_path / "fresh/tokens").settings["corpus"]["sources"][0]["commit"] == SECOND


def test_a_dataset_that_cannot_be_asked_for_its_commit_is_named(study: list[str], hub: Hub, tmp_path: Path):
    overrides = [*study, "corpus.sources=[{path: org/data}]"]
    error = ran(hub, overrides, tmp_path / "home", token="hf_wrong")
    assert error.startswith("error: corpus source org/data is neither a file nor a dataset that could be opened")
    assert error.count("\n") == 1 and not compose(ExtractSettings, overrides).tokens_folder.exists()
