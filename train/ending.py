"""How the ranks of a run end: together when all goes well; with one message and one status when something does not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from extract.command import DISK_ERRORS, EXIT_BAD_INPUT
from extract.errors import BadInput
from extract.interrupts import EXIT_INTERRUPTED
from train.meeting import LOOK_S, Meeting, Place
from train.watchdog import EXIT_HANG, GRACE_S, Watchdog

EXIT_FAILED = 1
JOIN_S = 60.0  # seconds in which all ranks come that refuse the same command line
LEAVE_S = 10.0  # seconds that the store stays for ranks that have nothing left to do


class FailedElsewhere(Exception):
    """Another rank failed, and says why."""


def first_to_say(error: Exception) -> bool:
    """Whether this rank is the first to meet an error that all do: they compose the same settings."""
    place = Place.of(os.environ)
    try:
        return Meeting.join(place, JOIN_S).first(f"said/{error}", str(place.rank))
    except (BadInput, dist.DistError):  # what hosts the store has gone: not before it has spoken
        return False


@contextmanager
def ended_together(meeting: Meeting, watchdog: Watchdog) -> Iterator[None]:
    """A block of all ranks. None of them leaves it well, or by SystemExit, before all have come to its end.

    The first rank that fails raises its error, and decides the status of all; the others leave with SystemExit, or are
    ended by their watchdogs wherever they wait. A rank that is gone is named instead of what its absence broke.
    """
    if meeting.place.size == 1:
        yield
        return
    watchdog.start()
    try:
        yield
    except SystemExit:
        leave(meeting, watchdog)
        raise
    except BaseException as error:
        try:
            _fail(meeting, watchdog, error)
        except dist.DistError:
            watchdog.end_lost()
        raise
    else:
        leave(meeting, watchdog)
    finally:
        watchdog.stop()


def leave(meeting: Meeting, watchdog: Watchdog) -> None:
    """Wait for all ranks, then end the watch."""
    rank, ranks = meeting.place.rank, range(meeting.place.size)
    meeting.tell(f"left/{rank}", "")
    with watchdog.doing("the end of the run", limited=True):
        for other in ranks:
            meeting.told(f"left/{other}")
    watchdog.stop()
    meeting.tell(f"seen/{rank}", "")
    end_at = time.monotonic() + LEAVE_S
    while meeting.place.hosts_store and time.monotonic() < end_at and not all(meeting.has(f"seen/{r}") for r in ranks):
        time.sleep(LOOK_S)


def _fail(meeting: Meeting, watchdog: Watchdog, error: BaseException) -> None:
    """Returns on the rank that is to raise its error; the others end here, after that one."""
    gone = watchdog.silent_ranks() if isinstance(error, RuntimeError) else []
    if isinstance(error, FailedElsewhere) or not watchdog.raise_alarm(EXIT_HANG if gone else status_of(error)):
        sys.exit(_status_of_others(watchdog))
    if gone:
        names = " and ".join(f"rank {rank}" for rank in gone)
        print(
            f"error: {names.capitalize()} of {meeting.place.size} ended without a word, which broke step "
            f"{watchdog.step} of the others. All ranks end; the same command continues from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
    watchdog.linger()
    if gone:
        sys.exit(EXIT_HANG)


def _status_of_others(watchdog: Watchdog) -> int:
    """What the rank that raised the alarm ends with, once it had time to; that of a failure where none has."""
    heard = watchdog.alarm()
    time.sleep(GRACE_S)
    alarm = heard or watchdog.alarm()
    watchdog.linger()
    return alarm.code if alarm else EXIT_FAILED


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with this error: see `extract.command`."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    mendable = isinstance(error, BadInput) or isinstance(error, OSError) and error.errno in DISK_ERRORS
    return EXIT_BAD_INPUT if mendable else EXIT_FAILED
