"""Nobody waits for ever: a rank that waits too long, dies or fails ends the run on all ranks, with one message.

A thread of every rank looks at the store twice a second. When a wait takes longer than the timeout, it asks all ranks
where they are, names those that are missing, and raises the alarm, at which every rank ends. A rank that fails raises
the alarm itself: see `train.ending`.

On a GPU collectives are queued, and the host goes on: an event behind each tells when it is over. A device hangs when
the first in its queue is not over and none was for as long as the timeout. A rank that dies breaks no collective there
as it does on CPUs: the others notice when they next vote on a step, or, if their hosts wait for the device before that,
after the timeout. torchrun ends them at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread

import torch
import torch.distributed as dist

from train.meeting import LOOK_S, Meeting

POLL_S = 0.5  # seconds between looks at the store
ANSWER_S = 3.0  # seconds in which a rank that lives says where it is
GRACE_S = 3.0  # seconds in which the rank that raised the alarm may say what happened and end first
# Exit status of a run of which a rank hangs or died, EX_SOFTWARE of sysexits.h.
EXIT_HANG = 70
ALARM, ASKED = "alarm", "where are you"


@dataclass
class Wait:
    """What a rank does since `since` (of time.monotonic) in step `step`; `limited` if the timeout holds for it.

    `is_over` is asked of what a device does; what the host does ends by itself.
    """

    what: str
    step: int
    since: float
    limited: bool
    is_over: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Alarm:
    """The run ends with status `code`: `rank` says why."""

    rank: int
    code: int


class Watchdog:
    """Of one rank, which computes on `device`. `step` is the one that it is in, for messages: the trainer sets it."""

    def __init__(self, meeting: Meeting, timeout_s: float):
        self.step, self.device, self.timeout_s = 0, torch.device("cpu"), timeout_s
        self._meeting, self._place = meeting.another(), meeting.place
        self._waits: list[Wait] = []
        self._queued: deque[Wait] = deque()
        self._last_over = time.monotonic()
        self._heard: Alarm | None = None
        self._answered, self._stopped = False, Event()
        self._thread = Thread(target=self._look_after, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """A collective, called in this block, for which the timeout holds."""
        with self.doing(what, limited=True):
            yield
        if self.device.type == "cuda" and self._place.size > 1:
            over = torch.cuda.Event()
            over.record()
            self._queued.append(Wait(what, self.step, time.monotonic(), True, partial(_is_over, over, self.device)))

    @contextmanager
    def doing(self, what: str, limited: bool = False) -> Iterator[None]:
        """What others are told if they wait for this rank meanwhile."""
        wait = Wait(what, self.step, time.monotonic(), limited)
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)

    def alarm(self) -> Alarm | None:
        """The alarm, if somebody has raised it; also when the store has gone since."""
        if self._heard is None and self._meeting.has(ALARM):
            self._heard = Alarm(**json.loads(self._meeting.told(ALARM)))
            self._meeting.tell(f"heard/{self._place.rank}", "")
        return self._heard

    def raise_alarm(self, code: int) -> bool:
        """End all ranks with `code`; whether this rank is the first, who says what happened."""
        is_first = self._meeting.first(ALARM, json.dumps({"rank": self._place.rank, "code": code}))
        self.alarm()
        return is_first

    def silent_ranks(self) -> list[int]:
        """The ranks that do not say where they are: their processes have ended or are stopped."""
        return [rank for rank, wait in enumerate(self._ask()) if wait is None]

    def linger(self) -> None:
        """Keep the store, where this rank hosts it, until the others have heard the alarm."""
        end_at = time.monotonic() + ANSWER_S
        keys = [f"heard/{rank}" for rank in range(self._place.size) if rank != self._place.rank]
        while self._place.hosts_store and time.monotonic() < end_at and not all(map(self._meeting.has, keys)):
            time.sleep(LOOK_S)

    def end_lost(self) -> None:
        """End where not even the store answers."""
        if self._heard:
            end(None, self._heard.code)
        end(f"error: Rank {self._place.rank} lost the others: rank 0, or what launched the ranks, has ended.")

    def _look_after(self) -> None:
        try:
            while not self._stopped.wait(POLL_S):
                try:
                    overdue = self._overdue()
                except RuntimeError as error:  # the device has failed
                    return self._fail(error)
                if self.alarm():
                    return self._end()
                if self._meeting.has(ASKED):
                    self._answer()
                if overdue:
                    self._hang(overdue)
        except dist.DistError:
            if not self._stopped.is_set():
                self.end_lost()

    def _fail(self, error: Exception) -> None:
        """End all ranks for an error of the device, unless the main thread meets it too, and says so first."""
        if self._stopped.wait(GRACE_S):
            return
        if not self.alarm() and self.raise_alarm(EXIT_HANG):
            self._speak(f"Rank {self._place.rank} found its device failed in step {self.step}: {error}.")
        self._end()

    def _end(self) -> None:
        """The alarm was raised elsewhere: let that rank speak, then end, whatever this one is waiting for."""
        alarm = self.alarm()
        if alarm and alarm.rank != self._place.rank and not self._stopped.wait(GRACE_S):
            self.linger()
            end(None, alarm.code)

    def _hang(self, wait: Wait) -> None:
        places = self._ask()
        if not self._stopped.is_set() and self.raise_alarm(EXIT_HANG):
            where = f"in step {wait.step} at '{wait.what}'"
            self._speak(
                f"Rank {self._place.rank} waited longer than engine.timeout_s={self.timeout_s:g} s {where}. "
                f"{missing(places, wait)}"
            )

    def _speak(self, what: str) -> None:
        """Say why this rank raised the alarm, and end it."""
        message = f"error: {what} All ranks end; the same command continues from the last checkpoint."
        print(message, file=sys.stderr, flush=True)
        self.linger()
        end(None)

    def _overdue(self) -> Wait | None:
        """What takes longer than the timeout, on the host or on the device."""
        now = time.monotonic()
        while self._queued and self._queued[0].is_over():
            self._queued.popleft()
            self._last_over = now
        for wait in list(self._queued)[:1]:
            if now - max(wait.since, self._last_over) > self.timeout_s:
                return wait
        limited = (wait for wait in list(self._waits) if wait.limited)
        return next((wait for wait in limited if now - wait.since > self.timeout_s), None)

    def _ask(self) -> list[Wait | None]:
        """Where every rank is; None for those that do not say. Nobody is asked any more once there is an alarm."""
        self._meeting.tell(ASKED, "")
        keys = [f"{ASKED}/{rank}" for rank in range(self._place.size)]
        end_at = time.monotonic() + ANSWER_S
        self._answer()
        while time.monotonic() < end_at and not self.alarm() and not all(map(self._meeting.has, keys)):
            time.sleep(LOOK_S)
        if self.alarm():
            return []
        return [_wait(self._meeting.told(key)) if self._meeting.has(key) else None for key in keys]

    def _answer(self) -> None:
        """Say where this rank is, once."""
        if not self._answered:
            self._answered, now = True, time.monotonic()
            wait = ([Wait("work of its own", self.step, now, False)] + self._waits[-1:] + list(self._queued)[:1])[-1]
            place = {"what": wait.what, "step": wait.step, "since": now - wait.since, "limited": wait.limited}
            self._meeting.tell(f"{ASKED}/{self._place.rank}", json.dumps(place))


def _is_over(event: torch.cuda.Event, device: torch.device) -> bool:
    """Whether the device has come to `event`; RuntimeError where it has failed. From any thread: one that never named
    its device would make a context on the first.
    """
    torch.cuda.set_device(device)
    return event.query()


def _wait(text: str) -> Wait:
    return Wait(**json.loads(text))


def missing(places: list[Wait | None], wait: Wait) -> str:
    """Who is not where `wait` is, in words."""
    found = []
    for rank, place in enumerate(places):
        if place is None:
            found.append(f"rank {rank}, which does not answer: its process has ended or is stopped")
        elif (place.step, place.what) != (wait.step, wait.what):
            found.append(f"rank {rank}, in step {place.step} at '{place.what}' for {place.since:.0f} s")
    return f"Missing: {'; '.join(found)}." if found else "All ranks are there: what connects them has failed."


def end(message: str | None, code: int = EXIT_HANG) -> None:
    """End this process from any thread: the main one may never return from what it waits for."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
