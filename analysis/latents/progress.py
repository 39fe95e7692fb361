"""How far a pass is: a bar on a terminal, a line a minute elsewhere, both with the time left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY_S = 60.0


class PassProgress:
    """Of `total` tokens, of which `done` were done by an earlier process. A context manager."""

    def __init__(self, total: int, done: int):
        self._total, self._before, self._done = total, done, done
        self._start = self._said = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc="latents", disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> PassProgress:
        if self._done:
            print(f"latents: goes on after {self._done / self._total:.0%} of {self._total} tokens", file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, done: int) -> None:
        """Tokens done so far."""
        self._bar.update(done - self._done)
        self._done, now = done, time.monotonic()
        if self._bar.disable and now - self._said >= EVERY_S:
            self._said = now
            print(f"latents: {self.line(now - self._start)}", file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What is said after so many seconds: "42% of 1000 tokens, 7 tokens/s, 1:23 left"."""
        speed = (self._done - self._before) / max(seconds, 1e-9)
        left = (self._total - self._done) / speed if speed else float("inf")
        shown = tqdm.format_interval(left) if left < float("inf") else "?"
        return f"{self._done / self._total:.0%} of {self._total} tokens, {speed:.0f} tokens/s, {shown} left"
