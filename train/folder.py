"""A folder that appears whole or not at all: written aside, synced, renamed; and the hash that tells a later change."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from extract.publish import rename


@contextmanager
def publishing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `folder` when the block ends, or disappears when it raises.

    An existing `folder` is replaced only after its successor is safely on disk. OSError, naming `folder`, where the
    disk refuses (no space left): safetensors reports such failures as errors of its own, without a number.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in [*sorted(partial.iterdir()), partial]:
                sync(path)
            _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Gives errors of the operating system the path that they are about, also those that safetensors met."""
    try:
        yield
    except SafetensorError as error:
        raise _disk_error(error, path) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        rename(folder, replaced)
    rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _disk_error(error: SafetensorError, folder: Path) -> OSError:
    """safetensors names the operating system's error in its text alone: "... (os error 28)"."""
    _, found, rest = str(error).partition("os error ")
    if not found:
        return OSError(None, str(error), str(folder))
    number = int(rest.partition(")")[0])
    return OSError(number, os.strerror(number), str(folder))
