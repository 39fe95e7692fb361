"""The process that reads the batches of several members of a sweep, once for all: see `train.ring`.

`train.shared_reader` starts it as `python -m train.reader SOCKETS key=value ...` with the settings of one member, whose
data are those of all. It waits until each has said where it starts, or has left. Those that start within AHEAD steps of
each other are fed, as are those that were stopped together; the others read for themselves. A batch stays until all
that are left are done with it, so the slowest sets the pace. The reader ends when all have left, or when what started
it, which holds the other end of its standard input, is gone; signals are for the members, who then leave.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from extract.command import compose
from extract.errors import BadInput
from train.config import TrainSettings
from train.data import ActivationPairs
from train.loader import Reading
from train.ring import AHEAD, SLOTS, Channel, Ring, ring_memory
from train.stops import StopRequest
from train.stream import BatchStream

log = logging.getLogger(__name__)
PATIENCE_S = 600.0  # seconds without a word after which those that are waited for are named
LONGEST = 5000  # characters of an error that members are told


class Orphaned(Exception):
    """What started the reader is gone."""


@dataclass(eq=False)
class Member:
    """Process `pid`, which wants steps [start, stop), None until it has said so, and is done with all up to `done`."""

    channel: Channel
    start: int | None = None
    stop: int = 0
    pid: int = 0
    data: Sequence[str] = ()
    done: int = -1

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "a process that does not train yet"

    def hear(self) -> bool:
        """Take a message; whether there was one."""
        message = self.channel.hear()
        if message is None:
            return False
        if "start" in message:
            self.start, self.stop, self.pid, self.data = (message[name] for name in ("start", "stop", "pid", "data"))
            self.done = message["start"] - 1
        self.done = max(self.done, message.get("done", -1))
        return True


class Members:
    """Those that have not left. `lifeline` is a file that ends when what started the reader does."""

    def __init__(self, ends: Iterable[socket.socket], lifeline: int):
        self.present, self._lifeline = [Member(Channel(end)) for end in ends], lifeline

    def wait_for_starts(self) -> None:
        """Until each has said where it starts."""
        self._wait_for(lambda member: member.start is None)

    def wait_until_done(self, step: int) -> None:
        """Until each is done with a step."""
        self._wait_for(lambda member: member.done < step)

    def wait_until_gone(self) -> None:
        self._wait_for(lambda member: True)

    def say(self, message: dict[str, Any], *descriptors: int) -> None:
        for member in self.present:
            member.channel.say(message, *descriptors)

    def leave_alone(self, member: Member, why: str) -> None:
        """Have a member read for itself."""
        member.channel.say({"alone": why})
        self._drop(member)

    def _wait_for(self, is_awaited: Callable[[Member], bool]) -> None:
        while awaited := [str(member) for member in self.present if is_awaited(member)]:
            ends = {member.channel.fileno(): member for member in self.present}
            heard, _, _ = select.select([self._lifeline, *ends], [], [], PATIENCE_S)
            if not heard:
                log.warning("All wait for %s, silent for %.0f s", " and ".join(awaited), PATIENCE_S)
            for end in heard:
                if end == self._lifeline:
                    raise Orphaned("what started it was killed")
                if not ends[end].hear():
                    self._drop(ends[end])

    def _drop(self, member: Member) -> None:
        member.channel.close()
        self.present.remove(member)


def serve(members: Members, open_stream: Callable[[], BatchStream], num_threads: int) -> None:
    """Feed those of `members` that can share, until all have left. What fails here, all are told before it is raised:
    Orphaned, BadInput, and whatever reading raises.
    """
    try:
        members.wait_for_starts()
        _part(members)
        if members.present:
            _feed(members, open_stream(), num_threads)
    except Exception as error:
        members.say({"failed": str(error)[:LONGEST], "mendable": isinstance(error, BadInput)})
        raise


def starting_together(starts: Sequence[int]) -> range:
    """AHEAD steps among which most of the members start; of equals the first."""
    windows = [range(first, first + AHEAD) for first in sorted(starts)]
    return max(windows, key=lambda window: sum(start in window for start in starts), default=range(0))


def _part(members: Members) -> None:
    """Leave alone all but those that start together, and one that nobody starts with."""
    together = starting_together([member.start or 0 for member in members.present])
    apart = [member for member in members.present if member.start not in together]
    if len(members.present) - len(apart) == 1:
        apart = list(members.present)
    for member in apart:
        members.leave_alone(member, f"no others start at step {member.start}, or less than {AHEAD} steps from it")


def _feed(members: Members, stream: BatchStream, num_threads: int) -> None:
    for member in list(members.present):
        if member.data != stream.data.content_sha256:
            members.leave_alone(member, "it found other data than the process that reads for the others")
    like = stream.data.buffer(stream.num_own_tokens)
    descriptor = ring_memory(like)
    members.say({"sharing": len(members.present)}, descriptor)
    ring, steps = Ring(descriptor, like), [(member.start or 0, member.stop) for member in members.present]
    reading = Reading(stream, max(stop for _, stop in steps), num_threads)
    try:
        for step in range(min(start for start, _ in steps), max(stop for _, stop in steps)):
            members.wait_until_done(step - SLOTS)
            if not members.present:
                return
            reading.read(step, ring.slot(step))
            members.say({"there": step})
        members.wait_until_gone()
    finally:
        reading.close()


def main(descriptors: str, overrides: list[str]) -> None:
    """`descriptors` are those of the reader's ends of the sockets, with commas between them."""
    logging.basicConfig(format="[reader] %(message)s")
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    members = Members([socket.socket(fileno=int(number)) for number in descriptors.split(",")], sys.stdin.fileno())
    settings = compose(TrainSettings, overrides)

    def open_stream() -> BatchStream:
        """When the members have opened their data: what is kept beside the store is there then."""
        data = ActivationPairs.open(settings)
        return BatchStream(data, settings.seed, settings.training.num_tokens_per_step, settings.data)

    try:
        serve(members, open_stream, settings.data.num_threads)
    except (BadInput, Orphaned):
        sys.exit(1)  # the members say why


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
