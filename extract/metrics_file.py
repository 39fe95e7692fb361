"""`metrics.jsonl`: one JSON object a line, each with the step after which it was written."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from extract.publish import publish

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of the bins between ascending `edges`, of which there is one more than `counts`."""

    edges: list[float]
    counts: list[int]


Metrics = dict[str, float | Histogram]
Values = Mapping[str, float | Histogram]


class MetricsFile:
    """The lines of a run. A number that is not finite becomes null, a histogram {"edges": [...], "counts": [...]}.

    A full disk ends no run: lines wait in memory until they can be written, and the log says so once.
    """

    def __init__(self, path: Path, steps_done: int):
        """Open `path` for a run that continues after `steps_done` steps: lines of later steps are removed."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        publish(path, b"".join(line for line in lines if _is_whole(line) and json.loads(line)["step"] <= steps_done))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._waiting, self._failed = b"", False

    def log(self, step: int, values: Values) -> None:
        line = json.dumps({"step": step, **{name: plain(value) for name, value in values.items()}})
        self._waiting += line.encode() + b"\n"
        with self._tolerant():
            self._write()

    def sync(self) -> None:
        """Bring all lines to disk: a checkpoint vouches for those before it."""
        with self._tolerant():
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._tolerant(), self._file:
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                log.warning("%s: %s. The run goes on; lines wait to be written.", self._file.name, error.strerror)
            self._failed = True


def plain(value: float | Histogram) -> object:
    """What JSON holds of a value."""
    if isinstance(value, Histogram):
        return asdict(value)
    return value if math.isfinite(value) else None


def _is_whole(line: bytes) -> bool:
    """A line cut short by a crash has no end."""
    return line.endswith(b"\n")
