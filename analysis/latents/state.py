"""Where a pass over a store stands, so that one that was stopped or killed goes on, and one that is finished is not
done again: no pickle, whole or not there.

<root>/<hash of the identity>/state.safetensors    every sum, count and document so far; what it belongs to and the next
                                                   batch in its header
<root>/<hash of the identity>/maxima.rows          see `analysis.examples.maxima`; what follows the rows that the state
                                                   counts is cut off

States of other settings stay until a pass has finished: a slip of the pen does not cost hours of work.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.examples.maxima import ROW
from extract.errors import BadInput
from extract.publish import partial_of, remove_partials, rename
from train.folder import disk_errors, sync

STATE_FILE, SPOOL_FILE, LOCK_FILE = "state.safetensors", "maxima.rows", "lock"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The batches and rows of document maxima that are done."""

    num_batches: int
    num_rows: int


class PassState:
    """The state of one pass below `root`. `identity`, plain values, names all that decides what the pass computes."""

    def __init__(self, root: Path, identity: Mapping[str, Any]):
        self._identity = json.dumps(identity, sort_keys=True)
        self.folder = root / hashlib.sha256(self._identity.encode()).hexdigest()[:16]

    @property
    def spool(self) -> Path:
        return self.folder / SPOOL_FILE

    def save(self, place: Place, arrays: Mapping[str, np.ndarray]) -> None:
        """Publish a state in place of the one before."""
        path = self.folder / STATE_FILE
        partial = partial_of(path)
        about = {"identity": self._identity, "place": json.dumps([place.num_batches, place.num_rows])}
        try:
            with disk_errors(path):
                save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, about)
                sync(partial)
                rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self) -> tuple[Place, dict[str, np.ndarray]] | None:
        """The last state of this pass; None where there is none or it is damaged: then whatever is there is removed.

        Says which states of other passes there are.
        """
        path = self.folder / STATE_FILE
        try:
            with safe_open(path, "np") as file:
                place = Place(*json.loads((file.metadata() or {})["place"]))
                if self.spool.stat().st_size < place.num_rows * ROW.itemsize:
                    raise ValueError(f"{self.spool} is too short")
                remove_partials(self.folder)
                return place, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if path.exists():
                log.warning("%s is damaged (%s): the pass begins anew", path, error)
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in self._others():
            log.warning(
                "%s belongs to a pass with other settings or inputs (%s). It is kept until this pass, which begins "
                "anew, has finished; to go on with it, stop and set them back.",
                other,
                self._differing(other / STATE_FILE),
            )
        return None

    def remove_others(self) -> None:
        """States of other passes are not needed any more."""
        for other in self._others():
            shutil.rmtree(other, ignore_errors=True)

    def _others(self) -> list[Path]:
        if not self.folder.parent.exists():
            return []
        return sorted(path for path in self.folder.parent.iterdir() if path.is_dir() and path != self.folder)

    def _differing(self, path: Path) -> str:
        """The parts of the identity in which the state at `path` differs."""
        try:
            with safe_open(path, "np") as file:
                theirs = json.loads((file.metadata() or {})["identity"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            return f"damaged: {error}"
        ours = json.loads(self._identity)
        return ", ".join(sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)))


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """One process at a time works below `root`; the system releases the lock of one that dies.

    Raises BadInput if another one does.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInput(
                f"{root.parent} is being analysed by another process ({file.read().strip() or 'just begun'}). Wait for "
                "it to end, or stop it."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
