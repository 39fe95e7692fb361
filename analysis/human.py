"""`human.jsonl`: what people say a latent is. Lines are appended; no step of the analysis touches them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from extract.errors import BadInput

HUMAN = "human.jsonl"


@dataclass(frozen=True)
class HumanLabel:
    """One line of `human.jsonl`: a person's label and category ("" = none given) of a latent, and when it was given."""

    latent: int
    label: str
    category: str
    note: str
    who: str
    at: str


def now() -> str:
    """The time to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_label(folder: Path, label: HumanLabel) -> None:
    """Adds a line to the labels of an analysis folder; on return it is on the disk.

    One write to a file opened for appending, so that two writers do not mix their lines.
    """
    line = json.dumps(asdict(label), ensure_ascii=False) + "\n"
    descriptor = os.open(folder / HUMAN, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode("utf-8", errors="backslashreplace"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_labels(folder: Path) -> dict[int, HumanLabel]:
    """The last label of every latent that has one; a last one without label and category withdraws what was said.

    BadInput for a line that is no label.
    """
    path = folder / HUMAN
    if not path.exists():
        return {}
    labels = (_parse(path, number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line)
    last = {label.latent: label for label in labels}
    return {latent: label for latent, label in last.items() if label.label or label.category}


def _parse(path: Path, number: int, line: bytes) -> HumanLabel:
    try:
        found = json.loads(line)
        label = HumanLabel(**{field.name: found[field.name] for field in fields(HumanLabel)})
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}, line {number}, is no label: {line[:80]!r}. Correct or delete the line.") from error
    texts = (label.label, label.category, label.note, label.who, label.at)
    if type(label.latent) is not int or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{path}, line {number}: latent must be a number and the rest text. Correct or delete the line.")
    return label
