"""The ranks of a run: who this one is, on which device, and what they decide together.

    with World.open(settings.engine, settings.training.device) as world: ...

Whatever happens in the block, all ranks end it: together when it ends well, with one message and one status when one of
them fails, hangs or dies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout  # it has no public name

from extract.devices import choose_device
from extract.errors import BadInput
from train.config import EngineConfig
from train.division import nearest_divisors
from train.ending import ended_together
from train.meeting import ALONE, Meeting, Place
from train.ranks import Group
from train.watchdog import Watchdog


class World:
    """Rank `everyone.rank` of `everyone.size`, computing on `device`; `is_main` on the one that writes and logs."""

    def __init__(self, meeting: Meeting, watchdog: Watchdog):
        self._meeting, self._watchdog = meeting, watchdog
        self.place, self.device, self.is_main = meeting.place, watchdog.device, meeting.place.rank == 0
        self.everyone = Group(meeting.place.rank, meeting.place.size, None, watchdog.watch)
        self._voters: dist.ProcessGroup | None = None
        # Of collectives themselves, which leaves the watchdog time to speak first.
        self._timeout = timedelta(seconds=2 * watchdog.timeout_s + 60)
        self._splits: dict[int, tuple[Group, Group]] = {}
        self._num_shared = 0

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """One process, without process groups."""
        meeting = Meeting.join(ALONE, 0)
        watchdog = Watchdog(meeting, 0)
        watchdog.device = torch.device(device)
        return cls(meeting, watchdog)

    @classmethod
    @contextmanager
    def open(cls, config: EngineConfig, device: str) -> Iterator[World]:
        """The ranks that were launched together, or one alone; `device` as in training.device.

        BadInput for ranks that do not come, engine=single under several, and a device that this rank cannot have.
        """
        place, timeout_s = Place.of(os.environ), config.timeout_s
        meeting = Meeting.join(place, timeout_s)
        watchdog = Watchdog(meeting, timeout_s)
        with ended_together(meeting, watchdog):
            check_engine(config.name, place)
            watchdog.device = device_of(device, place)
            world = cls(meeting, watchdog)
            if place.launched or config.name != "single":
                world._connect()
            yield world
        if dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self) -> None:
        place, is_cuda = self.place, self.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(self.device)
        with self._watchdog.watch("the ranks' first connection"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
                store=dist.PrefixStore("groups", self._meeting.store),
                rank=place.rank,
                world_size=place.size,
                timeout=self._timeout,
            )
            self._voters = self._new_group(backend="gloo") if place.size > 1 else None

    def _new_group(self, ranks: list[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
        """A group does not inherit the timeout of its parent."""
        return dist.new_group(ranks, self._timeout, backend)

    def limit(self, group: dist.ProcessGroup) -> None:
        """Give a group that a library made the timeout of all others: its own may be shorter than the watchdog's."""
        set_timeout(self._timeout, group)

    @property
    def step(self) -> int:
        """The step that this rank is in: what messages about hanging and dead ranks name."""
        return self._watchdog.step

    @step.setter
    def step(self, step: int) -> None:
        self._watchdog.step = step

    def split(self, size: int) -> tuple[Group, Group]:
        """(within, across): the `size` consecutive ranks around this one, and those in its place among others of them.

        Called by all ranks. BadInput where `size` does not divide their number.
        """
        everyone = self.everyone
        if everyone.size % size:
            nearest = nearest_divisors(size, everyone.size)
            raise BadInput(
                f"engine.ranks_per_copy={size} does not divide the {everyone.size} ranks. Nearest: {nearest}."
            )
        if size not in self._splits:
            starts = range(0, everyone.size, size)
            within = self._group([list(range(start, start + size)) for start in starts])
            across = self._group([list(range(first, everyone.size, size)) for first in range(size)])
            self._splits[size] = within, across
        return self._splits[size]

    def _group(self, partition: list[list[int]]) -> Group:
        """This rank's part of a partition of all ranks."""
        own = next(part for part in partition if self.everyone.rank in part)
        if len(own) == self.everyone.size:
            return self.everyone
        with self._watchdog.watch("groups of ranks"):
            groups = [self._new_group(part) for part in partition] if len(own) > 1 else [None] * len(partition)
        return Group(own.index(self.everyone.rank), len(own), groups[partition.index(own)], self._watchdog.watch)

    def tell(self, key: str, value: str) -> None:
        """Let all ranks know; to be told once for a key. From any thread."""
        self._meeting.tell(f"told/{key}", value)

    def told(self, key: str) -> str:
        """What a rank tells under `key`; waited for, however long it takes. From any thread."""
        return self._meeting.told(f"told/{key}")

    def from_main(self, value: Any) -> Any:
        """What rank 0 has, plain values that JSON holds, on all ranks; however long it takes there."""
        self._num_shared += 1
        key = f"from main/{self._num_shared}"
        if self.is_main:
            self.tell(key, json.dumps(value))
        with self.doing("waiting for rank 0"):
            return json.loads(self.told(key))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the other ranks enter when rank 0 has left it: what it leaves on disk is made once."""
        if not self.is_main:
            self.from_main(None)
        yield
        if self.is_main:
            self.from_main(None)

    def vote(self, word: int) -> Callable[[], int]:
        """Say `word`; the result, to be asked for later, is the largest of all ranks. Called by all in one order."""
        if self._voters is None:
            return lambda: word
        words = torch.tensor([word])
        work = dist.all_reduce(words, dist.ReduceOp.MAX, self._voters, async_op=True)

        def result() -> int:
            with self._watchdog.doing("the beginning of the step", limited=True):
                work.wait()
            return int(words)

        return result

    def doing(self, what: str) -> Any:
        """A block in which others that wait for this rank are told that it is at `what`."""
        return self._watchdog.doing(what)


def check_engine(name: str, place: Place) -> None:
    """BadInput for one process that was launched several times."""
    if name == "single" and place.size > 1:
        raise BadInput(
            f"engine=single is one process, and {place.size} ranks were launched. Choose engine=fsdp, deepspeed or "
            f"latent, or start one process."
        )


def device_of(name: str, place: Place) -> torch.device:
    """The device `name` of one process; under several ranks each has the GPU of its number on its host."""
    if place.size == 1 or name not in ("auto", "cuda"):
        if place.size > 1 and name != "cpu":
            raise BadInput(f"training.device={name} is one for {place.size} ranks. Use training.device=auto.")
        return choose_device(name, "training.device")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return choose_device(name, "training.device")
    own = num_gpus == 1 and (place.local_size <= 1 or place.own_gpu)
    if not own and place.local_rank >= num_gpus:
        raise BadInput(
            f"Rank {place.rank} is number {place.local_rank} on its host, which has {num_gpus} GPUs: a rank needs one "
            f"of its own. Start {num_gpus} ranks there, or choose training.device=cpu."
        )
    return torch.device("cuda", 0 if own else place.local_rank)
