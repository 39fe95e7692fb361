"""Work on a thread of its own, so that a GPU does not wait for what is done on the host with its last results."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class OneBehind:
    """Calls in their order, one at a time; an error is raised by the next `submit` or `wait`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "gathering")
        self._last: Future | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """Begins `work` once the call before has ended, and does not wait for it."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Until all that was submitted is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
