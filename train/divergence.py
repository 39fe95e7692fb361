"""What is known about a step that was not finite: where its batch came from, for whoever looks for the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from extract.publish import publish
from train.stream import BatchStream

FILE = "diverged.json"


def record(folder: Path, stream: BatchStream, step: int, reason: str) -> None:
    """Write `<folder>/diverged.json`: the step, counted from 0, its entries of the run, the epoch, and the positions of
    its tokens by the key of their document in the store.
    """
    about = {
        "step": step,
        "reason": reason,
        "entries": list(stream.entries(step)),
        "epoch": stream.epoch(step),
        "documents": _positions(stream, step),
    }
    publish(folder / FILE, (json.dumps(about) + "\n").encode())


def _positions(stream: BatchStream, step: int) -> dict[str, Any]:
    tokens, rows = stream.data.tokens, stream.plan(step)
    documents = np.searchsorted(tokens.row_starts, rows, side="right") - 1
    found: dict[str, list[int]] = {}
    for document, row in zip(documents.tolist(), rows.tolist(), strict=True):
        found.setdefault(tokens.keys[document], []).append(row - int(tokens.row_starts[document]))
    return found
