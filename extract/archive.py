"""The format on disk: tar shards that any WebDataset reader opens, each with an index that lets ours map them directly.

    <folder>/settings.json        what the shards are made with, written first; work continues only under the same ones
    <folder>/shard-00000.tar      members `<key>.<extension>`, one sample a key
    <folder>/shard-00000.index    JSON: [key, tokens] of every document, [name, offset, size] of every member, sha256,
                                  statistics
    <folder>/manifest.json        written last

A shard exists when its index does: the archive is renamed into place first, then the index. Bytes depend on the content
alone (no times, no owners), so equal content gives equal hashes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from extract.errors import BadInput
from extract.manifest import FORMAT_VERSION, ShardEntry
from extract.publish import naming, publish, rename
from extract.stats import ActivationStatistics

BLOCK = 512  # tar pads every member to whole blocks


class ShardWriter:
    """Writes one shard; use as a context manager. `finish` publishes it; leaving without `finish` leaves nothing."""

    def __init__(self, folder: Path, number: int):
        self.path = shard_path(folder, number)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._documents: list[tuple[str, int]] = []
        self._members: list[tuple[str, int, int]] = []
        self._hash = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._partial, "wb")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with naming(self.path):
                self._file.close()  # writes what is buffered: a full disk may say so only here
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, key: str, members: dict[str, bytes], tokens: int) -> None:
        """Append the sample `key`: one member per extension."""
        self._documents.append((key, tokens))
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(data)
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            self._members.append((header.name, self._offset, len(data)))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))

    def finish(self, statistics: ActivationStatistics | None = None, dtype: str | None = None) -> ShardEntry:
        """Publish the archive, then its index."""
        self._write(bytes(2 * BLOCK))
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            rename(self._partial, self.path)
        index = {
            "format_version": FORMAT_VERSION,
            "bytes": self._offset,
            "sha256": self._hash.hexdigest(),
            "documents": self._documents,
            "members": self._members,
            "dtype": dtype,
            "statistics": statistics.to_json() if statistics else None,
        }
        data = json.dumps(index).encode()
        publish(self.path.with_suffix(".index"), data)
        return _entry(self.path, index, data)

    def _write(self, data: bytes) -> None:
        with naming(self.path):
            self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def _entry(path: Path, index: dict, index_data: bytes) -> ShardEntry:
    tokens = sum(count for _, count in index["documents"])
    index_sha256 = hashlib.sha256(index_data).hexdigest()
    return ShardEntry(path.name, len(index["documents"]), tokens, index["bytes"], index["sha256"], index_sha256)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tar"


def finished_shard(path: Path) -> ShardEntry | None:
    """The entry of a shard that was published whole, or None: it must be written (again)."""
    index_path = path.with_suffix(".index")
    if not index_path.exists() or not path.exists():
        return None
    index = read_index(index_path)
    return _entry(path, index, index_path.read_bytes()) if path.stat().st_size == index["bytes"] else None


def read_index(path: Path) -> dict:
    try:
        index = json.loads(path.read_bytes())
        if index["format_version"] != FORMAT_VERSION:
            raise BadInput(f"{path} has format version {index['format_version']}, this release reads {FORMAT_VERSION}.")
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path} is missing or damaged ({error}). Delete it and run the stage again: only this shard is redone."
        ) from error


def start_folder(folder: Path, settings: dict) -> None:
    """Begin or continue a folder of shards: BadInput when it holds shards of other settings.

    Settings that no shard was made with yet (a mistake that stopped the first attempt) are replaced.
    """
    path = folder / "settings.json"
    data = json.dumps(settings, indent=1).encode()
    if not path.exists() or not any(folder.glob("shard-*.tar")):
        publish(path, data)
        return
    changed = "; ".join(_differences(json.loads(path.read_bytes()), json.loads(data)))
    if changed:
        raise BadInput(
            f"{folder} was made with other settings ({changed}). Choose another store=PATH, or delete the folder."
        )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """One "name: before there, now now" per leaf that two JSON values do not share."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in list(dict.fromkeys([*before, *now])):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield f"{name}: {before!r} there, {now!r} now"


class MappedShard:
    """One shard, mapped on first use. Pages are shared by all processes of a machine and never copied until somebody
    writes to them.
    """

    def __init__(self, folder: Path, entry: ShardEntry):
        self.path = folder / entry.file
        size = self.path.stat().st_size if self.path.exists() else "no"
        if size != entry.bytes:
            self._refuse(self.path, f"has {size} bytes, its manifest says {entry.bytes}: truncated or replaced")
        index_path = self.path.with_suffix(".index")
        self.index = read_index(index_path)
        if hashlib.sha256(index_path.read_bytes()).hexdigest() != entry.index_sha256:
            self._refuse(index_path, "was altered: its sha256 is not the manifest's")
        self.members = {name: (offset, size) for name, offset, size in self.index["members"]}
        self._map: mmap.mmap | None = None

    @staticmethod
    def _refuse(path: Path, what: str) -> NoReturn:
        raise BadInput(
            f"{path} {what}. Delete the shard, its index and the manifest and run the stage again: only this shard is "
            f"redone."
        )

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map

    def read(self, name: str) -> bytes:
        offset, size = self.members[name]
        return self.map[offset : offset + size]
