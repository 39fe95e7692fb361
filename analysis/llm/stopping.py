"""Stopping while requests are under way: nothing new is asked, and what is paid for is waited for a little."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from extract.errors import BadInput

# Schedulers kill a job about half a minute after they signal it.
GRACE_S = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Halted(Exception):
    """There is a reason to stop: what is left is for another run, and batches go on at the server."""


class Unasked(BadInput):
    """No more is asked in this run: what is left counts as failed for that reason, and another run asks it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason = reason


class Stop:
    """Why no more is asked, once there is a reason."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason: BaseException | None = None
        self.signals = 0

    def because(self, reason: BaseException) -> None:
        """Sets the reason, the first of which counts."""
        self.reason = self.reason or reason
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Halted once there is a reason."""
        if self.is_set:
            raise Halted

    async def wait(self) -> None:
        """Until there is a reason."""
        await self._event.wait()

    async def sleep(self, seconds: float) -> None:
        """Waits, but no longer than until there is a reason to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)


async def finish(work: Coroutine[Any, Any, None], stop: Stop) -> None:
    """Runs `work`, which ends by itself once `stop` is set; raises the reason. Of a signal, `GRACE_S` are left."""
    async with _signals_stop(stop):
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if isinstance(stop.reason, KeyboardInterrupt):
                await _grace(task, stop)
            else:
                await task
        finally:
            stopped.cancel()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if stop.reason:
        raise stop.reason


async def _grace(task: asyncio.Future[None], stop: Stop) -> None:
    deadline = asyncio.get_running_loop().time() + GRACE_S
    while not task.done() and stop.signals < 2 and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait({task}, timeout=0.1)


@contextlib.asynccontextmanager
async def _signals_stop(stop: Stop) -> AsyncIterator[None]:
    """Signals of a terminal or a scheduler set `stop` within this block, and do what they did before after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note() -> None:
        stop.signals += 1
        stop.because(KeyboardInterrupt())

    for number in SIGNALS:
        loop.add_signal_handler(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
