"""Ctrl-C ends a command with one line, whatever it is doing.

This module imports nothing heavy: a command enters `one_line_interrupts` before its imports, which take seconds.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What shells report for a process that SIGINT ended: 128 + 2.
EXIT_INTERRUPTED = 130


@contextmanager
def stops_interrupt() -> Iterator[None]:
    """A block that SIGTERM and SIGUSR1, by which schedulers end jobs, interrupt as Ctrl-C does: what the process holds
    is given back. A script of slurm/ sends SIGUSR1 until the process has ended: once is enough.
    """
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stops_wait() -> Iterator[Callable[[], bool]]:
    """A block that Ctrl-C, SIGTERM and SIGUSR1 do not interrupt: it asks the function that it is given whether one of
    them came, and leaves by itself when it has saved what it did. Then the interrupt follows. A second Ctrl-C does not
    wait. To be entered by the main thread.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def one_line_interrupts() -> Iterator[None]:
    """Turns a KeyboardInterrupt of its block into one line on standard error and exit status EXIT_INTERRUPTED."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command continues.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
