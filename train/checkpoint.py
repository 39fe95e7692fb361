"""Checkpoints: the whole training state, published as one folder, the last few kept.

    <folder>/step-00001000/state.safetensors    weights, Adam's moments, counters
    <folder>/step-00001000/state.json           steps, threshold, settings and data it belongs to, size of the tensors

Resuming from one equals never having stopped, bit for bit, on the same hardware and versions.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from extract.errors import BadInput
from train.engine import TrainingState
from train.folder import publishing_folder

FORMAT_VERSION = 1
TENSORS_FILE, VALUES_FILE = "state.safetensors", "state.json"
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. `identity` is what a resumed run must share: result settings, hashes of the data."""

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        self.folder, self._keep = folder, keep
        self._identity = json.loads(json.dumps(identity))

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
                "identity": self._identity,
                "bytes": (partial / TENSORS_FILE).stat().st_size,
            }
            (partial / VALUES_FILE).write_text(json.dumps(values, indent=1) + "\n")
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)

    def load(self) -> TrainingState | None:
        """The newest complete checkpoint, or None.

        BadInput when it belongs to other settings or data, naming what differs.
        """
        newest = self.newest()
        if newest is None:
            return None
        log.info("Resuming from %s", newest)
        values = json.loads((newest / VALUES_FILE).read_text())["values"]
        return TrainingState(load_file(newest / TENSORS_FILE), values)

    def newest(self) -> Path | None:
        """The folder of what `load` loads; BadInput as there."""
        complete = self._complete()
        if not complete:
            return None
        self._check_identity(complete[-1], json.loads((complete[-1] / VALUES_FILE).read_text())["identity"])
        return complete[-1]

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

    def _check_identity(self, path: Path, saved: dict[str, Any]) -> None:
        names = sorted(saved.keys() | self._identity.keys())
        differing = [name for name in names if saved.get(name) != self._identity.get(name)]
        if differing:
            values = "; ".join(f"{name}: {saved.get(name)} there, {self._identity.get(name)} now" for name in differing)
            raise BadInput(
                f"{path} was trained with other settings or data ({values}). "
                f"Restore them to continue, or delete {self.folder.parent} to start over."
            )


def _problem(path: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint."""
    if not re.fullmatch(r"step-\d{8,}", path.name):
        return "it was not published"
    try:
        values = json.loads((path / VALUES_FILE).read_text())
        size = (path / TENSORS_FILE).stat().st_size
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    if values.get("format_version") != FORMAT_VERSION:
        return f"format version {values.get('format_version')}, this release reads {FORMAT_VERSION}"
    return None if size == values["bytes"] else f"{TENSORS_FILE} has {size} bytes instead of {values['bytes']}"
