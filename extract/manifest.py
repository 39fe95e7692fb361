"""The manifest of a folder of shards: what lies there, where it came from, and hashes that prove it.

A manifest is the last file that a stage writes; a folder without one is unfinished. Its last entry is a sha256 over the
rest, so that an altered manifest is noticed when it is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from extract.errors import BadInput
from extract.publish import publish

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 lacks codecs with scales and spells bf16 "bfloat16"; nothing else differs for a reader
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")


@dataclass
class ShardEntry:
    """One shard: file name, counts, size and the hashes of the archive and of its index."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass
class Manifest:
    """`kind` is "tokens" or "activations"; fields that the other kind lacks are None.

    `settings` decide the content and must agree when work is continued; `provenance` (git commit, package versions,
    the composed settings of the command) is for the record.
    """

    kind: str
    documents: int
    tokens: int
    shards: list[ShardEntry]
    settings: dict
    provenance: dict = field(default_factory=dict)
    model: dict | None = None
    hookpoint: str | None = None
    d_model: int | None = None
    dtype: str | None = None
    tokens_sha256: str | None = None
    statistics: dict | None = None
    format_version: int = FORMAT_VERSION
    sha256: str = ""

    def content_sha256(self) -> str:
        """Hash of everything but provenance and the hash itself: equal for equal shards, whoever wrote them and
        when.
        """
        values = asdict(self)
        del values["sha256"], values["provenance"]
        return _digest(values)

    def write(self, folder: Path) -> None:
        values = asdict(self)
        del values["sha256"]
        self.sha256 = values["sha256"] = _digest(values)
        publish(folder / "manifest.json", json.dumps(values, indent=1, sort_keys=False).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of `folder`; BadInput if it is missing, altered or of another format version."""
        path = folder / "manifest.json"
        if not path.exists():
            raise BadInput(
                f"{folder} has no manifest.json: the stage that writes it has not finished. Run it again; it continues."
            )
        return cls.parse(path.read_bytes(), path)

    @classmethod
    def parse(cls, data: bytes, source: str | Path) -> Manifest:
        """The manifest in the bytes `data` that came from `source`, checked as by `read`."""
        try:
            values = json.loads(data)
            recorded = values.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(
                f"{source} is damaged ({error}). Delete it and run the stage again; finished shards are kept."
            ) from error
        if recorded != _digest(values):
            raise BadInput(
                f"{source} was altered: its sha256 does not match. Delete it and run the stage again; finished shards "
                f"are kept."
            )
        check_format(source, values["format_version"])
        values["shards"] = [ShardEntry(**entry) for entry in values["shards"]]
        for entry in values["shards"]:
            if not re.fullmatch(r"shard-\d+\.tar", entry.file):  # a name that is a path, or a shell's command
                raise BadInput(f"{source} lists {entry.file!r}, which is no name of a shard.")
        return cls(**values, sha256=recorded)


def check_format(path: str | Path, version: object) -> None:
    """BadInput unless this release reads manifests and indexes of `version`."""
    if version not in READABLE_VERSIONS:
        raise BadInput(
            f"{path} has format version {version}, this release reads {', '.join(map(str, READABLE_VERSIONS))}. "
            "Use the release that wrote it, or write the store again."
        )


def provenance(composed: dict | None = None) -> dict:
    """Git commit of this source tree (with "+" when it has changes), versions of the packages that shape the numbers,
    and the composed settings of the command that wrote the result (None where it was no command).
    """
    packages = {name: _version(name) for name in PACKAGES}
    return {"git_commit": _git_commit(), "packages": packages, "composed": composed}


@functools.cache
def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
