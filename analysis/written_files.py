"""Which files a command wrote: what its next run no longer writes goes, and what others put beside it stays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from analysis.damage import readable
from extract.publish import publish

Stamps = dict[Path, tuple[int, int]]


@contextmanager
def rewriting(record: Path, folders: Sequence[Path]) -> Iterator[None]:
    """Within, files of `folders`, which lie below the folder of `record`, are written by `publish`. Afterwards `record`
    names them, and those are gone that it named before and that were not written again.

    Where the block raises nothing is removed, and `record` names the files of both runs.
    """
    earlier, before = set(written(record)), _stamps(folders)
    try:
        yield
    except BaseException:  # of a signal to stop, too
        if now := _changed(before, folders):
            _note(record, earlier | now)
        raise
    now = _changed(before, folders)
    for path in earlier - now:
        if path.parent in folders:
            path.unlink(missing_ok=True)
    _note(record, now)


def written(record: Path) -> list[Path]:
    """The files that a record names; none without it."""
    if not record.is_file():
        return []
    with readable(record):
        return [record.parent / name for name in json.loads(record.read_bytes())]


def is_incomplete(record: Path) -> bool:
    """Whether a file is gone that a record names."""
    return not all(path.is_file() for path in written(record))


def _stamps(folders: Sequence[Path]) -> Stamps:
    """What tells whether a file was published anew, with the same content too."""
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return {path: (stat.st_ino, stat.st_mtime_ns) for path in paths for stat in [path.stat()]}


def _changed(before: Stamps, folders: Sequence[Path]) -> set[Path]:
    return {path for path, stamp in _stamps(folders).items() if before.get(path) != stamp}


def _note(record: Path, paths: set[Path]) -> None:
    names = sorted(path.relative_to(record.parent).as_posix() for path in paths)
    publish(record, (json.dumps(names, indent=1) + "\n").encode())
