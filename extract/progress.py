"""How far extraction is, as metrics: `<outputs>/{tokens,extraction}/metrics.jsonl`, and Weights & Biases, a run each.

Tokens are made by one process; the step of a line is their number. Activations are the work of several: one at a time
keeps the metrics of all, the one that holds the claim `progress`; when it leaves or dies, another goes on with the same
file and the same W&B run. The step of a line is the number of finished shards.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from extract.claims import Claims, clock
from extract.config import ExtractSettings
from extract.metrics_file import MetricsFile
from extract.mirror import FAILED, STOPPED, Mirror
from extract.status import Progress, current_claims, progress, tokens_per_second
from extract.stores import TokenStore

log = logging.getLogger(__name__)

EVERY_S = 30.0  # between lines, at least


class TokensLog:
    """Of the making of tokens, which goes on after `before` of them. A context manager; `note` whenever there are more,
    and `finished` when there are all. What cannot be logged is a warning.
    """

    def __init__(self, settings: ExtractSettings, before: int):
        self._settings, self._step, self._status = settings, before, STOPPED
        self._opened: tuple[MetricsFile, Mirror] | None = None
        self._since = time.monotonic()

    def __enter__(self) -> TokensLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _close(self._opened, status_of(kind, self._status))

    def note(self, num_documents: int, num_tokens: int) -> None:
        """Log the totals so far, unless this was done a moment ago."""
        if time.monotonic() - self._since >= EVERY_S:
            self._log(num_documents, num_tokens)

    def finished(self, num_documents: int, num_tokens: int) -> None:
        self._status = 0
        if num_tokens > self._step:
            self._log(num_documents, num_tokens)

    def _log(self, num_documents: int, num_tokens: int) -> None:
        now = time.monotonic()
        speed = (num_tokens - self._step) / max(now - self._since, 1e-9)
        values = {"tokens/documents": num_documents, "tokens/tokens": num_tokens, "tokens/tokens_per_second": speed}
        with _warned("making tokens"):
            self._opened = self._opened or _opened(self._settings, "tokens", self._step, asdict(self._settings))
            self._opened[0].log(num_tokens, values)
        self._step, self._since = num_tokens, now


class ProgressLog:
    """Of all workers that extract activations. A context manager; `note` from time to time, and `finished` when every
    model is.
    """

    def __init__(self, settings: ExtractSettings, tokens: TokenStore, claims: Claims):
        self._settings, self._tokens, self._claims = settings, tokens, claims
        self._next, self._step, self._status = -math.inf, -1, STOPPED
        self._opened: tuple[MetricsFile, Mirror] | None = None

    def __enter__(self) -> ProgressLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _close(self._opened, status_of(kind, self._status))

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
        with _warned("extraction"):
            if self._opened is None and self._claims.take("progress") is None:
                return
            now = clock(self._settings.claims_folder)
            entries = progress(self._settings, current_claims(self._settings, now))
            step = sum(len(entry.done) for entry in entries)
            if self._opened is None:
                facts = asdict(self._settings) | {"manifests": {"tokens": self._tokens.manifest.content_sha256()}}
                self._opened = _opened(self._settings, "extraction", step - 1, facts)
            if step > self._step:
                self._opened[0].log(step, metrics_of(entries, now))
                self._step = step


def _opened(settings: ExtractSettings, name: str, done: int, facts: dict[str, Any]) -> tuple[MetricsFile, Mirror]:
    """The log called `name`, without lines after the step `done`, and its W&B run with the configuration `facts`."""
    folder = Path(settings.outputs) / name
    path = folder / "metrics.jsonl"
    file = MetricsFile(path, done)
    return file, Mirror(settings.tracking, folder, name, "extract", settings.study, facts, path)


def status_of(kind: type[BaseException] | None, status: int) -> int:
    """How the W&B run of work ends that an exception of this `kind` ended, else `status`."""
    if kind is None or issubclass(kind, GeneratorExit):  # whoever takes the documents takes no more
        return status
    return STOPPED if issubclass(kind, KeyboardInterrupt) else FAILED


def _close(opened: tuple[MetricsFile, Mirror] | None, status: int) -> None:
    if opened is not None:
        file, mirror = opened
        file.close()
        mirror.end(status)


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """The work itself will say so if it cannot go on."""
    try:
        yield
    except OSError as error:
        log.warning("The progress of %s cannot be logged: %s", what, error)


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
