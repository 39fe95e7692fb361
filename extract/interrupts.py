"""Ctrl-C ends a command with one line, whatever it is doing.

This module imports nothing heavy: a command enters `one_line_interrupts` before its imports, which take seconds.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
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
