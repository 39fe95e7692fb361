"""The format on disk: tar shards that any WebDataset reader opens, each with an index that lets ours map them directly.

    <folder>/settings.json        what the shards are made with, written first; work continues only under the same ones
    <folder>/shard-00000.tar      members `<key>.<extension>`, one sample a key
    <folder>/shard-00000.index    JSON: [key, tokens] of every document, [name, offset, size] of every member, sha256,
                                  dtype, statistics, and where the sources of tokens stand after it (`resume`)
    <folder>/manifest.json        written last

A shard exists when its index does: the archive is renamed into place first, then the index. Bytes depend on the content
alone (no times, no owners), so equal content gives equal hashes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch

from extract.errors import BadInput
from extract.manifest import FORMAT_VERSION, ShardEntry, check_format
from extract.publish import naming, partial_of, publish, rename
from extract.remote import fetch, refuse_writing
from extract.stats import ActivationStatistics

BLOCK = 512  # tar pads every member to whole blocks
OVERLAP = 1 << 18  # from this size on, hashing beside writing gains more than it costs to hand it to a thread
MAX_BUFFERS = 1024  # that one writev takes (IOV_MAX of Linux and macOS)

Buffer = bytes | bytearray | memoryview  # of single bytes: its length is its size
Member = Buffer | list[Buffer]


class ShardWriter:
    """Writes one shard; use as a context manager. `finish` publishes it; leaving without `finish` leaves nothing.

    Members go to the file straight from the memory that the caller hands over. Writing and hashing release the GIL and
    run side by side, so a thread that writes a shard leaves the interpreter to the one that computes the next.
    """

    def __init__(self, folder: Path, number: int):
        self.path = shard_path(folder, number)
        self._partial = partial_of(self.path)
        self._documents: list[tuple[str, int]] = []
        self._members: list[tuple[str, int, int]] = []
        self._small = bytearray()
        self._hash = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "wb", buffering=0)
        self._hasher = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error: object) -> None:
        self._hasher.shutdown()
        try:
            with naming(self.path):
                self._file.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, key: str, members: dict[str, Member], tokens: int) -> None:
        """Append the sample `key`: per extension one member, a buffer of bytes or several that follow each other.

        Nothing refers to the buffers after the return.
        """
        self._documents.append((key, tokens))
        pieces: list[Buffer] = []
        end = self._offset
        for extension, member in members.items():
            buffers = member if isinstance(member, list) else [member]
            name, size = f"{key}.{extension}", sum(map(len, buffers))
            padding = -size % BLOCK
            pieces += [tar_header(name, size), *buffers, bytes(padding)]
            self._members.append((name, end + BLOCK, size))
            end += BLOCK + size + padding
        self._write(pieces, end - self._offset)

    def finish(
        self,
        statistics: ActivationStatistics | None = None,
        dtype: str | None = None,
        resume: dict[str, Any] | None = None,
    ) -> ShardEntry:
        """Publish the archive, then its index. `dtype` names the codec of activations; `resume`, for token shards, says
        where every source stands after this shard.
        """
        self._write([bytes(2 * BLOCK)], 2 * BLOCK)
        self._flush([])
        with naming(self.path):
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
            "resume": resume,
        }
        data, path = json.dumps(index).encode(), self.path.with_suffix(".index")
        try:
            publish(path, data)
        except OSError:
            if not path.exists():  # without an index the archive is no shard, only space on a full disk
                self.path.unlink(missing_ok=True)
            raise
        return _entry(self.path, index, data)

    def _write(self, buffers: list[Buffer], size: int) -> None:
        self._offset += size
        if size < OVERLAP:  # copied, because many small members are cheaper to hash and write together
            self._small += b"".join(buffers)
            buffers = []
        if buffers or len(self._small) >= OVERLAP:
            self._flush(buffers)

    def _flush(self, buffers: list[Buffer]) -> None:
        """Hash and write what has gathered, then `buffers`, both at once."""
        buffers, self._small = [self._small, *buffers], bytearray()
        hashing = self._hasher.submit(_update, self._hash, buffers)
        try:
            self._write_file(buffers)
        finally:
            hashing.result()

    def _write_file(self, buffers: list[Buffer]) -> None:
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        with naming(self.path):
            while pending:
                written = os.writev(self._file.fileno(), pending[:MAX_BUFFERS])
                while pending and written >= len(pending[0]):
                    written -= len(pending.pop(0))
                if written:
                    pending[0] = pending[0][written:]


def _update(sha256: Any, buffers: list[Buffer]) -> None:
    for buffer in buffers:
        sha256.update(buffer)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes in front of a member (ustar): an ordinary file of mode 0644, without owner or time.

    Equal to `tarfile.TarInfo.tobuf`, at a tenth of its time.
    """
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"tar member {name!r} of {size} bytes: names take 100 bytes, sizes stay below 8 GiB")
    owner, times, rest, checksum = _blank_header()
    digits = b"%011o" % size
    checksum += sum(encoded) + sum(digits)
    return b"".join((encoded.ljust(100, b"\0"), owner, digits, times, b"%06o\0 " % checksum, rest))


@functools.cache
def _blank_header() -> tuple[bytes, bytes, bytes, int]:
    """What lies between name, size and checksum and behind them, and the sum of it all; a checksum counts itself as
    blanks.
    """
    header = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
    parts = header[100:124], header[135:148], header[156:]
    return *parts, sum(map(sum, parts)) + sum(b" " * 8)


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
        check_format(path, index["format_version"])
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
    refuse_writing(folder)
    path = folder / "settings.json"
    data = json.dumps(settings, indent=1).encode()
    if not path.exists() or not any(folder.glob("shard-*.tar")):
        publish(path, data)
        return
    changed = "; ".join(_differences(read_settings(path), json.loads(data)))
    if changed:
        raise BadInput(
            f"{folder} was made with other settings ({changed}). Choose another store=PATH, or delete the folder."
        )


def read_settings(path: Path) -> dict:
    """What the shards beside `path` were made with; BadInput if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path} is damaged ({error}). python -m extract.verify ... repair=true makes it again from the manifest; "
            f"where there is none, delete the folder or choose another store=PATH."
        ) from error


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
    writes to them. `origin` is the URL of a remote store: its index is fetched now, its archive on first use.
    """

    def __init__(self, folder: Path, entry: ShardEntry, origin: str | None = None):
        self.path, self._entry, self._origin = folder / entry.file, entry, origin
        index_path = self.path.with_suffix(".index")
        if origin is None:
            self._check_size()
        elif _sha256_of(index_path) != entry.index_sha256:
            fetch(origin, index_path, None, entry.index_sha256)
        self.index = read_index(index_path)
        if _sha256_of(index_path) != entry.index_sha256:
            self._refuse(index_path, "was altered: its sha256 is not the manifest's")
        self.members = {name: (offset, size) for name, offset, size in self.index.pop("members")}
        self.index.pop("statistics")  # those of the folder are in its manifest; these would take 230 kB at D = 3584
        self._map: memoryview | None = None

    def _check_size(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else "no"
        if size != self._entry.bytes:
            self._refuse(self.path, f"has {size} bytes, its manifest says {self._entry.bytes}: truncated or replaced")

    @staticmethod
    def _refuse(path: Path, what: str) -> NoReturn:
        raise BadInput(
            f"{path} {what}. Delete the shard, its index and the manifest and run the stage again: only this shard is "
            f"redone."
        )

    def fetch(self) -> None:
        """Make the archive of a remote store local, if it is not."""
        if self._origin is not None and not self.path.exists():
            fetch(self._origin, self.path, self._entry.bytes, self._entry.sha256)

    @property
    def map(self) -> memoryview:
        """The archive, mapped by torch, which closes the file: Python's mmap keeps a descriptor for each of thousands
        of shards, and most systems allow a process 1024.
        """
        if self._map is None:
            self.fetch()
            self._check_size()
            mapped = torch.from_file(str(self.path), shared=False, size=self._entry.bytes, dtype=torch.uint8)
            self._map = mapped.numpy().data
        return self._map

    def member(self, name: str) -> memoryview:
        """The content of a member, mapped, not copied."""
        offset, size = self.members[name]
        return self.map[offset : offset + size]

    def read(self, name: str) -> bytes:
        return bytes(self.member(name))


def _sha256_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
