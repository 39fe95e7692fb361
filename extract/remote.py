"""Stores behind a URL: read as streams, checked against the manifest's hashes, kept in a local folder.

A store's location may be any URL that `webdataset.gopen` opens: `https:` and `http:` (curl), `gs:` (gsutil), `hf:`
(curl), `pipe:` (any command that writes the file to its standard output), and `s3:` (`aws s3 cp URL -`). The path of a
file inside the store goes where the URL says `{}`, else to its end:

    https://example.org/study/store
    s3://bucket/study/store
    pipe:ssh host cat /data/study/store
    pipe:aws --profile lab s3 cp s3://bucket/study/store/{} -

Opening fetches the manifest and the indexes; a shard is fetched when something in it is first read. What arrives is
published only if it has the sha256 that the manifest (or, for the manifest, its own last entry) states. The local
folder, `<cache>/<sha256 of the manifest file>`, is named after the content: a store that was written anew gets another
folder, never a mixture. The cache is CROSSDIFF_CACHE, or ~/.cache/crossdiff; put it on a disk of the machine rather
than a shared one. It grows to the size of what is read and is never trimmed: remove any folder in it when no process
reads it, and what is needed again is fetched again. Any number of processes may share it; each file is fetched once.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extract.errors import BadInput
from extract.manifest import Manifest
from extract.publish import publish, publishing

CACHE_VARIABLE = "CROSSDIFF_CACHE"
ORIGIN = "origin.txt"  # in the local folder of a remote store: the URL that it fills from
CHUNK = 1 << 20


def is_url(location: str | Path) -> bool:
    """Whether a store's location is a URL rather than a folder. (A Path never is: it drops a slash of `//`.)"""
    return isinstance(location, str) and re.match(r"(pipe:|[a-z][a-z0-9+.-]*://)", location) is not None


def join(url: str, *parts: str) -> str:
    """The URL of something inside the store at `url`."""
    path = "/".join(parts)
    return url.replace("{}", f"{path}/{{}}") if "{}" in url else f"{url.rstrip('/')}/{path}"


def local_folder(store: str, *parts: str) -> Path:
    """The folder `parts` of a store: of a remote one, the local folder that stands for it, mounted once a process."""
    return _mounted(join(store, *parts)) if is_url(store) else Path(store, *parts)


def mount(url: str, cache: Path | None = None) -> Path:
    """Fetch the manifest at `url` and return the local folder that fills itself with what is read, in `cache` or the
    usual one.

    Raises:
        BadInput: the manifest cannot be fetched or is damaged; nothing is left behind.
    """
    manifest_url = _file_url(url, "manifest.json")
    data = b"".join(_stream(manifest_url))
    Manifest.parse(data, manifest_url)
    folder = (cache or cache_folder()) / hashlib.sha256(data).hexdigest()
    for name, content in ((ORIGIN, url.encode()), ("manifest.json", data)):
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            publish(folder / name, content)
    return folder


_mounted = functools.cache(mount)


def cache_folder() -> Path:
    """Where remote stores are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/crossdiff").expanduser()


def origin_of(folder: Path) -> str | None:
    """The URL that a folder fills from; None for an ordinary one."""
    path = folder / ORIGIN
    return path.read_text() if path.exists() else None


def refuse_writing(location: str | Path) -> None:
    """BadInput for a URL, or for the local folder of a remote store."""
    origin = str(location) if is_url(location) else origin_of(Path(location))
    if origin is not None:
        raise BadInput(f"{origin} is remote, and remote stores are read only. Choose a folder: store=PATH.")


def fetch(url: str, path: Path, num_bytes: int | None, sha256: str) -> None:
    """Publish the file `path.name` of the store at `url` as `path`, unless another process has done so meanwhile.

    A file of unknown size, an index, is replaced if it is no longer what arrived; never removed, for others read it.

    Raises:
        BadInput: it cannot be read, or is not what the manifest says; `path` then does not exist.
    """
    source = _file_url(url, path.name)
    with _locked(path):
        if path.exists() and (num_bytes is not None or _sha256_of(path) == sha256):
            return
        for left_by_a_killed_process in path.parent.glob(f"{path.name}.*.partial"):
            left_by_a_killed_process.unlink()
        received, digest = 0, hashlib.sha256()
        with publishing(path) as file:
            for chunk in _stream(source):
                received += len(chunk)
                if num_bytes is not None and received > num_bytes:
                    break
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256 or received != (num_bytes or received):
                raise BadInput(
                    f"{source} is not the file that its manifest describes: its sha256 differs (of {received} bytes"
                    f"{f', expected {num_bytes}' if num_bytes else ''}). The transfer or the remote copy is damaged, "
                    "or the store was written anew: try again, or verify the remote store where it was made."
                )


def _sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _file_url(url: str, name: str) -> str:
    return url.replace("{}", name) if "{}" in url else f"{url.rstrip('/')}/{name}"


def _stream(url: str) -> Iterator[bytes]:
    """The content of `url` in chunks; BadInput if it cannot be read to its end."""
    try:
        with _open(url) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, ValueError, AssertionError) as error:
        raise BadInput(
            f"{url} could not be fetched ({error}). Check the location of the store, and that its command (curl, aws, "
            "gsutil, or the one of a pipe:) works here."
        ) from error


def _open(url: str) -> Any:
    from webdataset.gopen import gopen, gopen_schemes  # slow to import, and most stores are local

    if url.startswith("s3://") and "s3" not in gopen_schemes:
        url = f"pipe:aws s3 cp {shlex.quote(url)} -"
    return gopen(url)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the system releases the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
