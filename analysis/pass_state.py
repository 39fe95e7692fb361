"""Where a pass over a store stands, so that one that was stopped or killed goes on: no pickle, whole or not there.

<folder>/state.safetensors    every sum, count and document so far; what it belongs to and the next batch in its
                              header
<folder>/maxima.rows          see `analysis.maxima`; what follows the rows that the state counts is cut off
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from analysis.maxima import ROW
from extract.publish import partial_of, remove_partials, rename
from train.folder import disk_errors, sync

STATE_FILE, SPOOL_FILE = "state.safetensors", "maxima.rows"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The batches and rows of document maxima that are done."""

    num_batches: int
    num_rows: int


class PassState:
    """The state of one pass. `identity`, plain values, names all that decides what the pass computes."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self._identity = json.dumps(identity, sort_keys=True)

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
        """The last state of this pass; None where there is none, it belongs to another pass, or is damaged: then
        whatever is there is removed.
        """
        path = self.folder / STATE_FILE
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("identity") == self._identity:
                    place = Place(*json.loads(about["place"]))
                    if self.spool.stat().st_size >= place.num_rows * ROW.itemsize:
                        remove_partials(self.folder)
                        return place, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            log.warning("%s belongs to other settings or inputs: the pass begins anew", path)
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s): the pass begins anew", path, error)
        self.remove()
        return None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
