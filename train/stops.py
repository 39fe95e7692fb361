"""When a run stops before its end: signals, and the vote that makes all ranks stop at the same step.

A signal to any rank is enough. One to torchrun reaches all ranks if torchrun handles it: SIGTERM and SIGINT do, and
SIGUSR1 with --signals-to-handle; else that one kills torchrun, and its ranks end unsaved. torchrun gives ranks 30 s to
save (--shutdown-timeout), then kills them; its own status is 1 whatever theirs, and with --max-restarts it takes a rank
that was asked to stop for one that failed, and starts all again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.ending import FailedElsewhere
from train.loader import Batch, Loader
from train.world import World

# Exit status of a run that a signal stopped after saving a checkpoint, EX_TEMPFAIL of sysexits.h: the same command
# continues it.
EXIT_STOPPED = 75
# Launchers pass on signals that a terminal or scheduler has sent to every process already: a signal is a second request
# only after this many seconds.
AGAIN_S = 2.0


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a request to stop after the step, or while waiting for its data;
    a later one acts as usual.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested, self._since = False, 0.0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > AGAIN_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def starting_deaf() -> Iterator[None]:
    """A block whose child processes ignore SIGUSR1 until they listen, with StopRequest, and again when it acts as
    usual, rather than die of it. For a moment this process ignores it too: it is sent more than once, or waited for.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Turns:
    """The batches of this rank for steps [start, stop), as long as every rank has one and none is to stop.

    Before a step each rank says whether its batch is there (GO), whether it was asked to stop (STOP), or that its data
    failed (FAILED); the step is taken if all say GO, and else these were all. `failure` is then what this rank's data
    raised, or FailedElsewhere. A rank whose next batch is there already says so before the step at hand, so that nobody
    waits for the answer; it then stops one step later.
    """

    GO, STOP, FAILED = range(3)

    def __init__(self, batches: Loader, start: int, stop: int, request: StopRequest, world: World):
        self._batches, self._steps, self._request, self._world = batches, range(start, stop), request, world
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        own, said = iter(self._batches), None
        for step in self._steps:
            self._world.step = step
            batch = self._next(own) if said or not self._request.requested else None
            if said and self.failure:
                raise self.failure  # the others take the step: nothing can be saved together
            word = self.FAILED if self.failure else self.STOP if batch is None else self.GO
            agreed = (said or self._world.vote(word))()
            if agreed == self.FAILED and not self.failure:
                self.failure = FailedElsewhere(f"The data of another rank failed in step {step}.")
            if agreed != self.GO or batch is None:
                return
            can_say = self._world.everyone.size > 1 and not self._request.requested and self._batches.is_ready()
            said = self._world.vote(self.GO) if can_say else None
            yield batch

    def _next(self, own: Iterator[Batch]) -> Batch | None:
        try:
            with self._world.doing("waiting for its batch"):
                return next(own, None)
        except Exception as error:  # raised again once all ranks have left the loop: see `failure`
            self.failure = error
            return None
