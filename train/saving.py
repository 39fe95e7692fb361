"""Saving a checkpoint while training goes on: every rank writes its pieces, and rank 0 publishes the whole.

    copied      each rank copies its pieces to host memory; the rest happens in a thread, and training goes on
    folder      rank 0 makes the folder, under a name that nobody reads, and says so
    written     each rank writes, hashes and syncs a file in it, and says what it holds, or what went wrong
    published   rank 0 adds the table of contents and renames the folder, or removes it where anything went wrong

Ranks tell each other in the world's store: collectives belong to the training that goes on meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train.folder import disk_errors, publishing_folder, sha256_of, sync
from train.meeting import LOOK_S
from train.pieces import Piece, TrainingState, check_covering
from train.world import World

CONTENTS_FILE = "state.json"
SEEN_S = 70.0  # seconds until a new folder is seen on all hosts: NFS remembers for 60 that there was none


@dataclass(frozen=True)
class Words:
    """What ranks say to each other about one thing, whose `name` is never used again."""

    world: World
    name: str

    @property
    def rank(self) -> int:
        return self.world.everyone.rank

    @property
    def num_ranks(self) -> int:
        return self.world.everyone.size

    def say(self, what: str, value: Any) -> None:
        self.world.tell(f"{self.name}/{what}/{self.rank}", json.dumps(value))

    def hear(self, what: str, rank: int = 0) -> Any:
        """What `rank` says; waits until it does."""
        return json.loads(self.world.told(f"{self.name}/{what}/{rank}"))

    def hear_all(self, what: str) -> list[Any]:
        return [self.hear(what, rank) for rank in range(self.num_ranks)]


class Saving:
    """A checkpoint on its way to disk. Made by all ranks; `published` is called on rank 0 when it is there."""

    def __init__(
        self, path: Path, state: TrainingState, about: dict[str, Any], words: Words, published: Callable[[], None]
    ):
        """Returns once the state is copied and may change. `about` is written beside the table of contents."""
        self._path, self._about, self._words, self._published = path, about, words, published
        self._error: Exception | None = None
        self._pieces: dict[str, Piece] = {}
        try:
            self._pieces = copied_to_host(state.tensors)
        except Exception as error:  # raised by `finish`, on all ranks: they know of it only when told
            self._error = error
        self._thread = threading.Thread(target=self._run, name="saving", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until it is published. Where it cannot be, nothing is left of it: OSError, on all ranks."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._lead() if self._words.rank == 0 else self._follow()
        except Exception as error:  # raised by `finish`
            error.__cause__ = error.__cause__ or self._error
            self._error = error
        self._pieces = {}

    def _lead(self) -> None:
        awaited = "folder"
        try:
            with publishing_folder(self._path) as partial:
                self._words.say("folder", {"name": partial.name})
                awaited = "published"
                self._words.say("written", self._written(partial))
                reports = self._words.hear_all("written")
                for report in reports:
                    self._expect_no_error(report)
                (partial / CONTENTS_FILE).write_bytes(sealed({**self._about, **table_of_contents(reports)}))
            self._published()
        except Exception as error:
            self._words.say(awaited, self._described(error))
            raise
        self._words.say("published", {})

    def _follow(self) -> None:
        folder = self._words.hear("folder")
        self._expect_no_error(folder)
        self._words.say("written", self._written(self._path.with_name(folder["name"])))
        self._expect_no_error(self._words.hear("published"))

    def _written(self, folder: Path) -> dict[str, Any]:
        """Writes this rank's file; returns the report on it, or on the error."""
        try:
            if self._error is not None:
                raise self._error
            if not appears(folder, SEEN_S):
                raise OSError(errno.ENOENT, "rank 0's folder is not seen here; is the disk shared by all ranks?")
            with disk_errors(self._path):
                return write_pieces(folder / file_name(self._words.rank, self._words.num_ranks), self._pieces)
        except Exception as error:  # `finish` raises it on all ranks
            self._error = error
            return self._described(error)

    def _described(self, error: Exception) -> dict[str, Any]:
        number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, repr(error))
        at = f" (rank {self._words.rank})" if self._words.num_ranks > 1 and "(rank " not in str(text) else ""
        return {"error": [number, f"{text}{at}"]}

    def _expect_no_error(self, report: dict[str, Any]) -> None:
        if "error" in report:
            raise OSError(*report["error"], str(self._path))


def appears(folder: Path, within_s: float) -> bool:
    """Whether `folder`, which another host made, is there before `within_s` seconds are over."""
    end_at = time.monotonic() + within_s
    while not folder.is_dir():
        if time.monotonic() > end_at:
            return False
        time.sleep(LOOK_S)
    return True


def file_name(rank: int, num_ranks: int) -> str:
    return f"state-{rank:05d}-of-{num_ranks:05d}.safetensors"


def copied_to_host(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """Copies that no later step changes; through pinned memory, which torch keeps for the next time, from a GPU."""
    copies = {}
    for name, piece in pieces.items():
        rows = torch.empty(piece.rows.shape, dtype=piece.rows.dtype, pin_memory=piece.rows.is_cuda)
        copies[name] = Piece(rows.copy_(piece.rows, non_blocking=True), piece.first, piece.num_rows)
    for device in {piece.rows.device for piece in pieces.values() if piece.rows.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def write_pieces(path: Path, pieces: dict[str, Piece]) -> dict[str, Any]:
    """Write one rank's file durably; returns what the table of contents needs to know of it."""
    held = {name: piece for name, piece in pieces.items() if len(piece.rows)}
    save_file({name: piece.rows for name, piece in held.items()}, path)
    sync(path)
    tensors = {
        name: {
            "dtype": str(piece.rows.dtype).removeprefix("torch."),
            "shape": [piece.num_rows, *piece.rows.shape[1:]],
            "first": piece.first,
            "stop": piece.stop,
        }
        for name, piece in held.items()
    }
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "tensors": tensors}


def table_of_contents(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """`files` with size and hash, and `tensors` with the rows that each file holds.

    ValueError, naming the tensor, unless the files hold every row of it once.
    """
    files = {report["file"]: {"bytes": report["bytes"], "sha256": report["sha256"]} for report in reports}
    tensors: dict[str, Any] = {}
    for report in reports:
        for name, held in report["tensors"].items():
            part = {"file": report["file"], "first": held["first"], "stop": held["stop"]}
            tensor = tensors.setdefault(name, {"dtype": held["dtype"], "shape": held["shape"], "parts": []})
            if (tensor["dtype"], tensor["shape"]) != (held["dtype"], held["shape"]):
                raise ValueError(f"{name} has {held['dtype']} {held['shape']} in {report['file']}, and not elsewhere")
            tensor["parts"].append(part)
    for name, tensor in tensors.items():
        check_covering(name, tensor["shape"][0], [(part["first"], part["stop"]) for part in tensor["parts"]])
    return {"files": files, "tensors": tensors}


def sealed(contents: dict[str, Any]) -> bytes:
    """JSON that tells whether it was altered: `sha256` is of all the rest."""
    return (json.dumps({**contents, "sha256": _hash_of(contents)}, indent=1) + "\n").encode()


def is_sealed(contents: dict[str, Any]) -> bool:
    """Whether nothing was altered since `sealed`."""
    rest = {name: value for name, value in contents.items() if name != "sha256"}
    return _hash_of(rest) == contents.get("sha256")


def _hash_of(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
