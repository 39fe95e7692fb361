"""What the local files of a source held when tokens were made from them, so that a changed corpus is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from extract.config import SourceConfig
from extract.errors import BadInput
from extract.records import local_files, path_within, visible_files

HASHED_BYTES = 1 << 30
MIN_HASHED_BYTES = 1 << 20
NUM_BLOCKS = 16

Fingerprints = dict[str, dict]


def fingerprints(source: SourceConfig) -> Fingerprints:
    """Size and sha256 of every local file by its path within the source, so that a corpus may be moved; nothing for a
    dataset of the hub, which its commit stands for.

    The files of a source share `HASHED_BYTES`, so that this takes about a second whatever the corpus. A file within its
    part is hashed whole; of a larger one `NUM_BLOCKS` blocks, evenly spread from the first byte to the last. A change
    of the size is always seen, a change in place that lies between the blocks of a larger file is not.
    """
    path = Path(source.path)
    files = local_files(source) or (visible_files(path) if path.is_dir() else [])
    part = max(HASHED_BYTES // max(len(files), 1), MIN_HASHED_BYTES)
    return {
        str(path_within(source, file)): {"bytes": file.stat().st_size, "sha256": _sha256(file, part)} for file in files
    }


def _sha256(file: Path, part: int) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as opened:
        if size <= part:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        block = part // NUM_BLOCKS
        for number in range(NUM_BLOCKS):
            opened.seek((size - block) * number // (NUM_BLOCKS - 1))
            digest.update(opened.read(block))
    return digest.hexdigest()


def check_unchanged(folder: Path, name: str, before: Fingerprints, now: Fingerprints) -> None:
    """BadInput, naming the file, when source `name` is not what the tokens in `folder` were made from."""
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            what = "is gone" if file not in now else "is new" if file not in before else "has changed"
            raise BadInput(
                f"corpus source {name}: its file {file} {what} since the tokens in {folder} were made from it. Bring "
                f"back the corpus of that time, or choose another store=PATH, or delete {folder} and what was made "
                f"from it."
            )
