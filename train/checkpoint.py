"""Checkpoints: the whole training state, published as one folder by all ranks, read by any others.

    <folder>/step-00001000/state-00002-of-00008.safetensors    rank 2's rows of weights, Adam's moments, counters
    <folder>/step-00001000/state.json                          size and sha256 of each file, which rows of which tensor
                                                               it holds; steps, threshold; settings and data that the
                                                               state belongs to; and its own sha256

Tensors keep their names whatever the engine, and rows are counted in the whole tensor: a run continues on another
number of ranks and with another engine. Resuming on the same ranks, CPU and versions equals never having stopped, bit
for bit (a GPU sums some gradients in any order).

Not torch.distributed.checkpoint (as of torch 2.13): its table of contents, plain values and what ranks tell each other
to plan a save are pickles. Its writer of safetensors keeps no table of contents between ranks and no plain values, so
that nothing tells whether all files are there. Neither hashes anything, and both write into the folder's final place.
Partitions of flattened weights, as ZeRO cuts them, are not among the shapes that it puts together.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from extract.errors import BadInput
from train.folder import sha256_of
from train.pieces import Extent, SavedState, TrainingState, covering
from train.saving import CONTENTS_FILE, Saving, Words, is_sealed
from train.world import World

FORMAT_VERSION = 3
PUBLISHED = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. `identity` is what a resumed run must share: result settings, hashes of the data.

    The `keep` newest are kept, and those after a multiple of `keep_every` steps (0 = no others) for ever. Made by all
    ranks of `world` together, as `save`, `load`, `wait` and `close` are called.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any], world: World, keep_every: int = 0):
        self.folder, self._keep, self._keep_every, self._world = folder, keep, keep_every, world
        self.identity = json.loads(json.dumps(identity))
        self._name, self._numbers = world.from_main(uuid.uuid4().hex), itertools.count()
        self._saving: Saving | None = None

    def save(self, state: TrainingState) -> None:
        """Copy `state` and publish it while training goes on; then remove what is not kept any more.

        First waits for the save before this one. OSError, on all ranks, where that failed on any of them: complete
        checkpoints are as they were.
        """
        self.wait()
        path = self.folder / f"step-{state.values['steps_done']:08d}"
        about = {"format_version": FORMAT_VERSION, "values": state.values, "identity": self.identity}
        self._saving = Saving(path, state, about, self._words(), lambda: self._remove_old(path))

    def wait(self) -> None:
        """Until the last save is published. OSError, on all ranks, where it failed on any of them."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._world.doing("waiting for the last checkpoint"):
                saving.finish()

    def close(self) -> None:
        self.wait()

    def load(self) -> SavedState | None:
        """The newest intact checkpoint, or None where none was ever published; damaged ones are named in the log.

        Each rank hashes its share of the files. BadInput, on all ranks, when the newest belongs to other settings or
        data, naming what differs, and when none is intact.
        """
        self.wait()
        found = self._world.from_main(self._found() if self._world.is_main else None)
        for path in (self.folder / name for name in reversed(found["complete"])):
            saved = self.read(path)
            if saved is not None:
                if self._world.is_main:
                    log.info("Resuming from %s", path)
                return saved
        if found["published"]:
            raise BadInput(
                f"No checkpoint in {self.folder} is intact (what is wrong with each is said above), so the run cannot "
                f"be continued. Restore one, or delete {self.folder} to train from the start."
            )
        return None

    def read(self, path: Path) -> SavedState | None:
        """The state in a complete checkpoint; None where it is damaged, which the log says. BadInput, on all ranks,
        when it belongs to other settings or data, naming what differs.
        """
        contents = self._world.from_main(_contents(path) if self._world.is_main else None)
        self.check(path, contents["identity"])
        damage = self._damage(path, contents["files"])
        if damage and self._world.is_main:
            log.warning("Ignoring the damaged checkpoint %s: %s", path, damage)
        return None if damage else opened(path, contents)

    def complete(self) -> dict[int, Path]:
        """The complete checkpoints that there are now, by the steps done, oldest first; this rank's own look."""
        found = sorted(self.folder.glob("step-*"), key=_step_of)
        return {_step_of(path): path for path in found if _problem(path) is None}

    def check_newest(self) -> None:
        """BadInput when the newest complete checkpoint, if there is one, belongs to other settings or data."""
        for name in self._found()["complete"][-1:]:
            self.check(self.folder / name, _contents(self.folder / name)["identity"])

    def check(self, path: Path, saved: dict[str, Any]) -> None:
        """BadInput, naming what differs, when `saved`, the identity of what lies at `path`, is not that of this run.

        The `weights` of models, which a crosscoder also records, are not compared: hashes of the data stand for them.
        """
        names = sorted((saved.keys() | self.identity.keys()) - {"weights"})
        differing = [name for name in names if saved.get(name) != self.identity.get(name)]
        if differing:
            values = "; ".join(f"{name}: {saved.get(name)} there, {self.identity.get(name)} now" for name in differing)
            raise BadInput(
                f"{path} was trained with other settings or data ({values}). "
                f"Restore them to continue, or delete {self.folder.parent} to start over."
            )

    def _words(self) -> Words:
        return Words(self._world, f"{self._name}/{next(self._numbers)}")

    def _found(self) -> dict[str, Any]:
        """Names of `complete` checkpoints, oldest first, and whether any was `published`. Others are left alone, and
        named in the log.
        """
        complete = []
        for path in sorted(self.folder.glob("step-*"), key=_step_of):
            problem = _problem(path)
            if problem:
                log.warning("Ignoring the incomplete checkpoint %s: %s", path, problem)
            else:
                complete.append(path.name)
        return {"complete": complete, "published": any(_step_of(path) >= 0 for path in self.folder.glob("step-*"))}

    def _damage(self, path: Path, files: dict[str, Any]) -> str:
        """What is wrong with the files of a checkpoint, as any rank found; "" where nothing is."""
        words = self._words()
        words.say("damage", "; ".join(_damages(path, files, words.rank, words.num_ranks)))
        return "; ".join(found for found in words.hear_all("damage") if found)

    def _remove_old(self, newest: Path) -> None:
        """Of complete checkpoints those that are not kept, but no later ones: they are damaged, see `load`. And what
        killed processes left unfinished. What cannot be removed stays, and is named in the log.
        """
        try:
            for path in self._not_kept(newest):
                shutil.rmtree(path)
        except OSError as error:
            log.warning("%s is saved, but what it makes superfluous could not be removed: %s", newest, error)

    def _not_kept(self, newest: Path) -> Iterator[Path]:
        for path in self.folder.glob("step-*.partial"):
            yield path
        so_far = (path for path in self.folder.glob("step-*") if 0 <= _step_of(path) <= _step_of(newest))
        complete = [path for path in sorted(so_far, key=_step_of, reverse=True) if _problem(path) is None]
        for path in complete[self._keep :]:
            if not self._keep_every or _step_of(path) % self._keep_every:
                yield path


def opened(path: Path, contents: dict[str, Any]) -> SavedState:
    """The state in the files of a checkpoint, of which nothing but the headers is read yet."""
    files = {name: safe_open(path / name, framework="pt") for name in contents["files"]}
    extents = {
        name: [Extent(part["first"], part["stop"], files[part["file"]].get_slice(name)) for part in tensor["parts"]]
        for name, tensor in contents["tensors"].items()
    }
    num_rows = {name: tensor["shape"][0] for name, tensor in contents["tensors"].items()}
    return SavedState(
        {name: covering(name, num_rows[name], parts) for name, parts in extents.items()}, contents["values"]
    )


def newest_step(folder: Path) -> int:
    """Steps done at the newest published checkpoint, of which nothing is read; 0 where there is none."""
    return max([0, *(_step_of(path) for path in folder.glob("step-*"))])


def _step_of(path: Path) -> int:
    """Steps done at a published checkpoint; -1 where the folder is none."""
    match = PUBLISHED.fullmatch(path.name)
    return int(match[1]) if match else -1


def _contents(path: Path) -> dict[str, Any]:
    return json.loads((path / CONTENTS_FILE).read_text())


def _problem(path: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint."""
    if _step_of(path) < 0:
        return "it was not published"
    try:
        contents = _contents(path)
        version = contents.get("format_version")
    except (OSError, ValueError, AttributeError) as error:
        return f"{CONTENTS_FILE} is unreadable ({error})"
    if version != FORMAT_VERSION:
        return f"format version {version}, this release reads {FORMAT_VERSION}"
    if not is_sealed(contents):
        return f"{CONTENTS_FILE} was altered: its sha256 is another"
    return next(_wrong_sizes(path, contents["files"]), None)


def _wrong_sizes(path: Path, files: dict[str, Any]) -> Iterator[str]:
    for name, file in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            yield f"{name} is unreadable ({error})"
        else:
            if size != file["bytes"]:
                yield f"{name} has {size} bytes instead of {file['bytes']}"


def _damages(path: Path, files: dict[str, Any], rank: int, num_ranks: int) -> Iterator[str]:
    """What this rank finds: it looks whether it sees all files as they should be, and reads its share of them."""
    yield from (wrong := list(_wrong_sizes(path, files)))
    if wrong:
        return
    for name in list(files)[rank::num_ranks]:
        try:
            if sha256_of(path / name) != files[name]["sha256"]:
                yield f"the sha256 of {name} is not the one in {CONTENTS_FILE}"
        except OSError as error:
            yield f"{name} is unreadable ({error})"
