"""The format on disk: tar shards that any WebDataset reader opens, each with an index that lets ours map them directly.

    <folder>/settings.json        what the shards are made with, written first (`extract.made_with`)
    <folder>/shard-00000.tar      members `<key>.<extension>`, one sample a key
    <folder>/shard-00000.index    JSON: bytes, sha256, for activations a digest of settings.json (`made_with_sha256`);
                                  then [key, tokens] of every document, [name, offset, size] of every member, dtype,
                                  statistics, and where the sources of tokens stand after it (`resume`)
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from extract.errors import BadInput
from extract.manifest import FORMAT_VERSION, ShardEntry, check_format
from extract.publish import naming, partial_of, publish, rename
from extract.stats import ActivationStatistics

BLOCK = 512  # tar pads every member to whole blocks
OVERLAP = 1 << 18  # from this size on, hashing beside writing gains more than it costs to hand it to a thread
MAX_BUFFERS = 1024  # that one writev takes (IOV_MAX of Linux and macOS)
HEAD = 512  # bytes of an index that hold everything in front of its documents

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
        made_with_sha256: str | None = None,
    ) -> ShardEntry:
        """Publish the archive, then its index. `dtype` names the codec of activations and `made_with_sha256` their
        settings; `resume`, for token shards, says where every source stands after this shard.
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
            **({"made_with_sha256": made_with_sha256} if made_with_sha256 else {}),
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
    return None if _head(path) is None else read_shard(path)[0]


def read_shard(path: Path) -> tuple[ShardEntry, dict]:
    """The entry and the index of a finished shard."""
    index_path = path.with_suffix(".index")
    index = read_index(index_path)
    return _entry(path, index, index_path.read_bytes()), index


def is_finished(path: Path, made_with_sha256: str) -> bool:
    """Whether a shard was published whole, by the beginning of its index: a whole one takes milliseconds to parse.

    Raises:
        BadInput: it was made with other settings. An index of an earlier release, which does not say, passes.
    """
    head = _head(path)
    if head is not None and head.get("made_with_sha256") not in (None, made_with_sha256):
        raise BadInput(
            f"{path} was made with other settings than {path.parent / 'settings.json'} states: workers of different "
            f"settings shared the folder. Choose another store=PATH; or, once no worker is at it, let python -m "
            f"extract.verify ... name all such shards, and repair=true make them again."
        )
    return head is not None


def _head(path: Path) -> dict | None:
    """What the index of a shard says before its documents; None if archive or index is missing or cut short."""
    index_path = path.with_suffix(".index")
    try:
        with open(index_path, "rb") as file:
            start = file.read(HEAD)
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        return None
    try:
        head = json.loads(start[: start.index(b', "documents"')] + b"}")
        check_format(index_path, head["format_version"])
    except (ValueError, KeyError):  # damaged, or written by others in another order
        head = read_index(index_path)
    return head if head.get("bytes") == num_bytes else None


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
