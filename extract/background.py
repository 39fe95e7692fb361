"""Work in one thread beside the caller, a piece at a time, whose errors the caller gets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Background:
    """A context manager around one thread. Of two pieces of work the second waits for the first, so the memory of at
    most one piece is held beside the caller's own. Torch works there in one thread: a second team would fight the
    caller's for the cores.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background", initializer=torch.set_num_threads, initargs=(1,))
        self._running: Future | None = None

    def __enter__(self) -> Background:
        return self

    def submit(self, work: Callable[[], object]) -> None:
        """Begin `work` once the piece before it has ended; raises what that raised."""
        self._finish()
        self._running = self._thread.submit(work)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the last piece. Its error is raised unless the block is already ending with one."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()
