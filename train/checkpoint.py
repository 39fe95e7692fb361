"""Checkpoints: the whole training state, published as one folder, the last few kept.

    <folder>/step-00001000/state.safetensors    weights, Adam's moments, counters
    <folder>/step-00001000/state.json           steps, threshold, settings and data it belongs to; size and sha256 of
                                                the tensors

Resuming from one equals never having stopped, bit for bit, on the same CPU and versions (a GPU sums some gradients in
any order).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from extract.errors import BadInput
from train.engine import TrainingState
from train.folder import publishing_folder, sha256_of

FORMAT_VERSION = 2
TENSORS_FILE, VALUES_FILE = "state.safetensors", "state.json"
ENTRIES = {"values", "identity", "bytes", "sha256"}
PUBLISHED = re.compile(r"step-\d{8,}")
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. `identity` is what a resumed run must share: result settings, hashes of the data."""

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        self.folder, self._keep = folder, keep
        self.identity = json.loads(json.dumps(identity))

    def save(self, state: TrainingState) -> None:
        """Publish `state`, then remove the oldest beyond `keep`.

        OSError, with all complete checkpoints intact, where the disk refuses.
        """
        path = self.folder / f"step-{state.values['steps_done']:08d}"
        with publishing_folder(path) as partial:
            tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
            save_file(tensors, partial / TENSORS_FILE)
            values = {
                "format_version": FORMAT_VERSION,
                "values": state.values,
                "identity": self.identity,
                "bytes": (partial / TENSORS_FILE).stat().st_size,
                "sha256": sha256_of(partial / TENSORS_FILE),
            }
            (partial / VALUES_FILE).write_text(json.dumps(values, indent=1) + "\n")
        so_far = [other for other in self._complete() if other.name <= path.name]  # a later one is damaged: see `load`
        for old in so_far[: -self._keep]:
            shutil.rmtree(old)

    def load(self) -> TrainingState | None:
        """The newest intact checkpoint, or None where none was ever published; damaged ones are named in the log.

        BadInput when the newest belongs to other settings or data, naming what differs, and when none is intact.
        """
        complete = self._complete()
        for path in reversed(complete):
            values = self._values(path)
            try:
                tensors = _intact_tensors(path, values)
            except (OSError, ValueError, SafetensorError) as error:
                log.warning("Ignoring the damaged checkpoint %s: %s", path, error)
                continue
            log.info("Resuming from %s", path)
            return TrainingState(tensors, values["values"])
        if any(PUBLISHED.fullmatch(path.name) for path in self.folder.glob("step-*")):
            raise BadInput(
                f"No checkpoint in {self.folder} is intact (what is wrong with each is said above), so the run cannot "
                f"be continued. Restore one, or delete {self.folder} to train from the start."
            )
        return None

    def check_newest(self) -> None:
        """BadInput when the newest complete checkpoint, if there is one, belongs to other settings or data."""
        for path in self._complete()[-1:]:
            self._values(path)

    def check(self, path: Path, saved: dict[str, Any]) -> None:
        """BadInput, naming what differs, when `saved`, the identity of what lies at `path`, is not that of this run."""
        names = sorted(saved.keys() | self.identity.keys())
        differing = [name for name in names if saved.get(name) != self.identity.get(name)]
        if differing:
            values = "; ".join(f"{name}: {saved.get(name)} there, {self.identity.get(name)} now" for name in differing)
            raise BadInput(
                f"{path} was trained with other settings or data ({values}). "
                f"Restore them to continue, or delete {self.folder.parent} to start over."
            )

    def _values(self, path: Path) -> dict[str, Any]:
        """What stands beside the tensors of a complete checkpoint of this run; BadInput for one of another."""
        values = json.loads((path / VALUES_FILE).read_text())
        self.check(path, values["identity"])
        return values

    def _complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first; others are named in the log and left alone."""
        found = []
        for path in sorted(self.folder.glob("step-*")):
            problem = _problem(path)
            if problem:
                log.warning("Ignoring the incomplete checkpoint %s: %s", path, problem)
            else:
                found.append(path)
        return found


def _intact_tensors(path: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; ValueError when they are not what was saved."""
    if sha256_of(path / TENSORS_FILE) != values["sha256"]:
        raise ValueError(f"the sha256 of {TENSORS_FILE} is not the one in {VALUES_FILE}")
    return load_file(path / TENSORS_FILE)


def _problem(path: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint."""
    if not PUBLISHED.fullmatch(path.name):
        return "it was not published"
    try:
        values = json.loads((path / VALUES_FILE).read_text())
        size = (path / TENSORS_FILE).stat().st_size
        version, missing = values.get("format_version"), sorted(ENTRIES - values.keys())
    except (OSError, ValueError, AttributeError) as error:
        return f"unreadable ({error})"
    if version != FORMAT_VERSION:
        return f"format version {version}, this release reads {FORMAT_VERSION}"
    if missing:
        return f"{VALUES_FILE} lacks {', '.join(missing)}"
    return None if size == values["bytes"] else f"{TENSORS_FILE} has {size} bytes instead of {values['bytes']}"
