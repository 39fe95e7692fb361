"""Publishing files: a path holds all of its content, safely on disk, or does not exist.

Everything is written under a `.partial` name of its own, synced, and renamed: processes that publish the same path at
the same time do not touch each other's bytes. Whoever dies on the way leaves a `.partial` that nobody reads.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def publish(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically and durably, making its folder if needed."""
    with publishing(path) as file:
        file.write(data)


def publish_first(path: Path, data: bytes) -> bool:
    """Like `publish`, but never over a file that is there: returns whether `path` is the one written here."""
    own = partial_of(path)
    try:
        with naming(path):
            publish(own, data)
            try:
                os.link(own, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links, whose users must look at what the file says
                own.replace(path)
            _sync(path.parent)
    finally:
        own.unlink(missing_ok=True)
    return True


@contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends, or nothing when it raises."""
    partial = partial_of(path)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """A name beside `path`, never used before, to write to until the content is whole."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left in a folder that is now complete."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the path that it came from: "no space left on device" then says where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def rename(partial: Path, path: Path) -> None:
    """Rename a file or folder whose content is already synced into place, and sync the folder that holds it."""
    partial.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
