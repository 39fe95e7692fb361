"""The members of a sweep on this machine: each in processes of its own, so that what ends one leaves the others."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from types import FrameType

from extract.errors import BadInput
from train.shared_reader import run_members
from train.stops import EXIT_STOPPED, StopRequest, starting_deaf
from train.sweep import Member, status_text
from train.watchdog import EXIT_HANG

log = logging.getLogger(__name__)
LOOK_S = 0.2  # seconds between looks at the processes
INSIST_S = 3.0  # seconds after which those that still run hear SIGUSR1 again


class LocalRunner:
    """Members one after another, each on `ranks` ranks; with sweep.share_reader together, of one rank each."""

    def __init__(self, ranks: int):
        self._ranks = ranks

    def __call__(self, members: list[Member]) -> bool:
        """A signal asks the members at hand to save and end, and no other is started."""
        if any(member.settings.sweep.share_reader for member in members):
            check_sharing(self._ranks, "hydra.launcher.ranks")
            return run_together(members) == EXIT_STOPPED
        for member in members:
            member.record()
        with PassedOn() as signals:
            for number, member in enumerate(members, 1):
                log.info("[%d/%d] %s", number, len(members), member.name)
                with starting_deaf():
                    processes = [subprocess.Popen(member.command, env=own) for own in environments(self._ranks)]
                member.ended = status_text(status_of_ranks(signals.wait(processes)))
                member.record()
                if signals.requested:
                    return True
        return False


def run_together(members: list[Member]) -> int:
    """Run members with one reader; the status of all: that of one which is worth another try, if there is one."""
    for member in members:
        member.record()
    with PassedOn() as signals:
        statuses = run_members(members, signals)
    if signals.requested or EXIT_STOPPED in statuses:
        return EXIT_STOPPED
    if any(status is None or status < 0 or status == EXIT_HANG for status in statuses):
        return EXIT_HANG
    return max(status or 0 for status in statuses)


def check_sharing(ranks: int, setting: str) -> None:
    """BadInput for several ranks: members that share a reader are processes of one rank."""
    if ranks > 1:
        raise BadInput(
            f"{setting}={ranks} with sweep.share_reader=true, where every member is one process on one GPU. Leave one "
            f"of them out."
        )


class PassedOn:
    """Hands SIGINT, SIGTERM and SIGUSR1 to the processes that are waited for, whose second SIGINT or SIGTERM acts as
    usual. A terminal sends SIGINT to all of them by itself: what comes twice within seconds is one request.

    However often SIGUSR1 comes, it is one request: it is handed on until they have ended, for those that do not listen
    yet have not heard it. They are to be started in a block `starting_deaf`.
    """

    def __init__(self) -> None:
        self.requested, self._insist_at = False, math.inf
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> PassedOn:
        self._before = {number: signal.signal(number, self._pass_on) for number in StopRequest.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(
        self, processes: list[subprocess.Popen[bytes]], tell: Callable[[int, int], None] = lambda number, status: None
    ) -> list[int]:
        """The statuses of processes that have just started; of each that ends, its number and status are told."""
        self._processes, statuses = processes, dict[int, int]()
        if self.requested:  # since they were started
            self._pass_on(signal.SIGTERM, None)
        while len(statuses) < len(processes):
            time.sleep(LOOK_S)
            self._insist()
            for number, process in enumerate(processes):
                if number not in statuses and (status := process.poll()) is not None:
                    statuses[number] = status
                    tell(number, status)
        return [statuses[number] for number in range(len(processes))]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGUSR1:
            self._insist_at = min(self._insist_at, time.monotonic())
        else:
            self._send(number)

    def _insist(self) -> None:
        if time.monotonic() >= self._insist_at:
            self._send(signal.SIGUSR1)
            self._insist_at = time.monotonic() + INSIST_S

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each of the ranks of a run on this machine; of one process, that of this one."""
    if ranks == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        {**os.environ, **meeting, "LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    ]


def status_of_ranks(statuses: list[int]) -> int:
    """That of all, which end together; of a run that a signal ended without a word from any rank, minus its number."""
    return max(statuses) if any(status > 0 for status in statuses) else min(statuses)
