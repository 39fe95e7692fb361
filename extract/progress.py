"""How far extraction is, all workers together, as metrics: `<outputs>/extraction/metrics.jsonl` and Weights & Biases.

One worker at a time keeps them, the one that holds the claim `progress`; when it leaves or dies, another goes on with
the same file and the same W&B run. The step of a line is the number of finished shards.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from extract.claims import Claims, clock
from extract.config import ExtractSettings
from extract.metrics_file import MetricsFile
from extract.mirror import FAILED, STOPPED, Mirror
from extract.status import Progress, current_claims, progress, tokens_per_second
from extract.stores import TokenStore

log = logging.getLogger(__name__)

EVERY_S = 30.0  # between lines, at least


class ProgressLog:
    """A context manager; `note` from time to time, and `finished` when every model is."""

    def __init__(self, settings: ExtractSettings, tokens: TokenStore, claims: Claims):
        self._settings, self._tokens, self._claims = settings, tokens, claims
        self._next, self._step, self._status = -math.inf, -1, STOPPED
        self._opened: tuple[MetricsFile, Mirror] | None = None

    def __enter__(self) -> ProgressLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._opened is not None:
            file, mirror = self._opened
            file.close()
            mirror.end(self._status if kind is None else FAILED)

    def note(self) -> None:
        """Log the progress, unless another worker does, or this was done a moment ago."""
        if time.monotonic() >= self._next:
            self._log()
            self._next = time.monotonic() + EVERY_S

    def finished(self) -> None:
        """Log that all is there, if this worker had a part in it."""
        self._status = 0
        if self._next > -math.inf:
            self._log()

    def _log(self) -> None:
        try:
            if self._opened is None and self._claims.take("progress") is None:
                return
            now = clock(self._settings.claims_folder)
            entries = progress(self._settings, current_claims(self._settings, now))
            step = sum(len(entry.done) for entry in entries)
            if self._opened is None:
                self._opened = self._open(step)
            if step > self._step:
                self._opened[0].log(step, metrics_of(entries, now))
                self._step = step
        except OSError as error:  # the work itself will say so if it cannot go on
            log.warning("The progress of extraction cannot be logged: %s", error)

    def _open(self, step: int) -> tuple[MetricsFile, Mirror]:
        settings, folder = self._settings, Path(self._settings.outputs) / "extraction"
        path = folder / "metrics.jsonl"
        file = MetricsFile(path, step - 1)
        facts = asdict(settings) | {"manifests": {"tokens": self._tokens.manifest.content_sha256()}}
        return file, Mirror(settings.tracking, folder, "extraction", "extract", settings.study, facts, path)


def metrics_of(entries: list[Progress], now: float) -> dict[str, float]:
    """What the entries of all models and hookpoints say together at the time `now`."""
    done, wanted = defaultdict[str, int](int), defaultdict[str, int](int)
    for entry in entries:
        done[entry.model] += entry.tokens_done
        wanted[entry.model] += entry.num_tokens
    return {
        "extract/tokens": sum(done.values()),
        "extract/shards": sum(len(entry.done) for entry in entries),
        "extract/tokens_per_second": tokens_per_second([shard for entry in entries for shard in entry.done], now),
        "extract/claimed": sum(entry.num_claimed for entry in entries),
        **{f"extract/done/{model}": done[model] / wanted[model] for model in wanted},
    }
