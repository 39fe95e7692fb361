"""`human.jsonl`: what people say a latent is. Lines are appended; no step of the analysis touches them.

A latent is a number in one crosscoder: each line names its weights, and those of other weights are kept, but not used.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from extract.errors import BadInput

HUMAN = "human.jsonl"
# The record of the step that reads the crosscoder, and its weights among the inputs there.
RECORD, WEIGHTS = "latents.json", "crosscoder.safetensors"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HumanLabel:
    """One line of `human.jsonl`: a person's label and category ("" = none given) of a latent, and when it was given.

    `crosscoder` is the SHA-256 of the weights that the latent belongs to; `append_label` fills it in.
    """

    latent: int
    label: str
    category: str
    note: str
    who: str
    at: str
    crosscoder: str = ""


def now() -> str:
    """The time to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def crosscoder_of(folder: Path) -> str:
    """The SHA-256 of the weights that an analysis folder is of; "" where there is no record of them."""
    path = folder / RECORD
    return json.loads(path.read_bytes())["inputs"][WEIGHTS] if path.exists() else ""


def append_label(folder: Path, label: HumanLabel) -> None:
    """Adds a line, of the crosscoder of the analysis folder, to its labels; on return it is on the disk.

    OSError where it cannot be, as on a full disk: the file is then as it was.
    """
    line = json.dumps(asdict(replace(label, crosscoder=crosscoder_of(folder))), ensure_ascii=False) + "\n"
    descriptor = os.open(folder / HUMAN, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        # After a line that was cut off, by a loss of power for instance, this one stands by itself.
        start = "" if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n" else "\n"
        try:
            _write(descriptor, (start + line).encode("utf-8", errors="backslashreplace"))
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    """All of it: one write may take a part alone."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def read_labels(folder: Path) -> dict[int, HumanLabel]:
    """The last label of every latent that has one; a last one without label and category withdraws what was said.

    Lines of another crosscoder are left out, with a warning. BadInput for a line that is no label.
    """
    if unused := unused_labels(folder):
        log.warning(unused)
    crosscoder = crosscoder_of(folder)
    last = {label.latent: label for label in _lines(folder) if label.crosscoder == crosscoder}
    return {latent: label for latent, label in last.items() if label.label or label.category}


def unused_labels(folder: Path) -> str:
    """Says how many lines are of another crosscoder; nothing where none is."""
    labels, crosscoder = _lines(folder), crosscoder_of(folder)
    num_others = sum(label.crosscoder != crosscoder for label in labels)
    said = f"{folder / HUMAN}: {num_others} of {len(labels)} lines are of another crosscoder and not used"
    return said if num_others else ""


def _lines(folder: Path) -> list[HumanLabel]:
    path = folder / HUMAN
    lines = enumerate(path.read_bytes().splitlines(), 1) if path.exists() else ()
    return [_parse(path, number, line) for number, line in lines if line.strip()]


def _parse(path: Path, number: int, line: bytes) -> HumanLabel:
    try:
        found = {"crosscoder": "", **json.loads(line)}
        label = HumanLabel(**{field.name: found[field.name] for field in fields(HumanLabel)})
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}, line {number}, is no label: {line[:80]!r}. Correct or delete the line.") from error
    texts = [value for name, value in asdict(label).items() if name != "latent"]
    if type(label.latent) is not int or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{path}, line {number}: latent must be a number and the rest text. Correct or delete the line.")
    return label
