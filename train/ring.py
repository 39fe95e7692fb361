"""Batches that one process reads for several members of a sweep: where they lie, and what is said about them.

The reader (`train.reader`) and a member hold the two ends of a socket; messages are packets of JSON on it:

    member -> reader    {"start": 0, "stop": 900, "pid": 17, "data": [hashes]}    wants the batches of steps [0, 900)
    reader -> member    {"alone": "why"}, or {"sharing": 3} with the descriptor of the ring
    reader -> member    {"there": 5}                  the batches of all steps up to 5 lie in the ring
    member -> reader    {"done": 5}                   it needs none of those up to 5 any more
    reader -> member    {"failed": "why", "mendable": true}

Batches lie as they are stored in a ring of SLOTS buffers, step t in buffer t mod SLOTS, in memory that has no name. The
system frees it when the last process that has it ends, and closes sockets likewise: whoever ends, even by SIGKILL,
leaves nothing behind and nothing locked, and the other ends of its sockets know at once.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from extract.codecs import Encoded
from extract.errors import BadInput
from train.loader import LOOK_S, RING, Reading, Source
from train.stream import BatchStream
from train.watchdog import EXIT_HANG

log = logging.getLogger(__name__)
SLOTS = 8  # buffers
AHEAD = SLOTS + RING  # steps, more than a member can be ahead of the slowest: a loader may hold RING copies besides
READER = "CROSSDIFF_READER"  # in a member's environment: the descriptor of its end of the socket
LARGEST = 1 << 16  # bytes of a message


class ReaderGone(Exception):
    """The process that reads for this one has failed or ended."""


class Channel:
    """One end of a socket between a reader and a member."""

    def __init__(self, end: socket.socket):
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def say(self, message: dict[str, Any], *descriptors: int) -> None:
        """Nobody hears it where the other end is gone: `hear` tells that."""
        try:
            socket.send_fds(self._end, [json.dumps(message).encode()], descriptors)
        except (BrokenPipeError, ConnectionResetError):
            return

    def hear(self) -> dict[str, Any] | None:
        """The next message, waited for, with the `descriptor` that came with it; None once the other end is gone."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._end, LARGEST, 1)
        except ConnectionResetError:  # told once, before what the other end has said
            packet, descriptors, _, _ = socket.recv_fds(self._end, LARGEST, 1)
        message: dict[str, Any] = json.loads(packet) if packet else {}
        if descriptors:
            message["descriptor"] = descriptors[0]
        return message or None

    def shut(self) -> None:
        """End the conversation: `hear` returns None on both ends, also where it waits."""
        self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end.close()


class Ring:
    """SLOTS buffers like `like` in the memory behind a descriptor, which this closes."""

    def __init__(self, descriptor: int, like: Encoded):
        try:
            memory = mmap.mmap(descriptor, SLOTS * _slot_bytes(like))
        finally:
            os.close(descriptor)
        self._slots = [_view(memory, slot * _slot_bytes(like), like) for slot in range(SLOTS)]

    def slot(self, step: int) -> Encoded:
        """The buffer of a step's batch."""
        return self._slots[step % SLOTS]


def ring_memory(like: Encoded) -> int:
    """A descriptor of memory for a ring of buffers like `like`. OSError where there is not as much."""
    descriptor = os.memfd_create("crossdiff")
    try:
        os.posix_fallocate(descriptor, 0, SLOTS * _slot_bytes(like))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _tensors(encoded: Encoded) -> list[Tensor]:
    return [tensor for tensor in (encoded.codes_ND, encoded.scales_N) if tensor is not None]


def _slot_bytes(like: Encoded) -> int:
    """Every tensor begins with a page."""
    return sum(_whole_pages(tensor) for tensor in _tensors(like))


def _whole_pages(tensor: Tensor) -> int:
    return -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _view(memory: mmap.mmap, offset: int, like: Encoded) -> Encoded:
    found = []
    for tensor in _tensors(like):
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=offset)
        found.append(flat.view(tensor.shape))
        offset += _whole_pages(tensor)
    return Encoded(*found)


class SharedBatches:
    """The batches that a reader leaves in a ring, from step `start` on: a `train.loader.Source`.

    On a CPU a batch is the ring's own buffer, not copied; a buffer that is pinned for a GPU takes a copy.
    """

    def __init__(self, channel: Channel, stream: BatchStream, start: int, descriptor: int):
        self._channel, self._stream, self._there = channel, stream, start - 1
        self._ring = Ring(descriptor, stream.data.buffer(stream.num_own_tokens))
        self._given_up = False

    def buffer(self, pinned: bool = False) -> Encoded | None:
        return self._stream.data.buffer(self._stream.num_own_tokens, pinned) if pinned else None

    def read(self, step: int, into: Encoded | None) -> Encoded:
        self._channel.say({"done": step - RING})
        while self._there < step:
            self._there = self._heard()["there"]
        slot = self._ring.slot(step)
        if into is None:
            return slot
        for tensor, source in zip(_tensors(into), _tensors(slot), strict=True):
            tensor.copy_(source)
        self._channel.say({"done": step})
        return into

    def give_up(self) -> None:
        self._given_up = True
        self._channel.shut()

    def close(self) -> None:
        self._channel.close()

    def _heard(self) -> dict[str, Any]:
        message = self._channel.hear()
        if message is None and self._given_up:
            raise CancelledError
        return not_failed(message)


def not_failed(message: dict[str, Any] | None) -> dict[str, Any]:
    """What a reader says. BadInput for what a user can mend, ReaderGone for what else ended the reader."""
    if message is not None and "failed" not in message:
        return message
    if message is not None and message["mendable"]:
        raise BadInput(message["failed"])
    reason = "was killed" if message is None else f"failed: {message['failed']}"
    raise ReaderGone(
        f"The process that reads for the members of this sweep {reason}. Steps that were done are saved; the same "
        "command continues."
    )


def source_of(stream: BatchStream, start: int, stop: int, num_threads: int, is_stopping: Callable[[], bool]) -> Source:
    """Where the batches of steps [start, stop) come from: the stream, read here; or a reader, if this process was
    started with one that has others to feed with the same batches.
    """
    descriptor = os.environ.pop(READER, None)
    found = None
    if descriptor is not None:
        end = socket.socket(fileno=int(descriptor))
        end.set_inheritable(False)
        found = joined(Channel(end), stream, start, stop, is_stopping)
    return found or Reading(stream, stop, num_threads)


def joined(
    channel: Channel, stream: BatchStream, start: int, stop: int, is_stopping: Callable[[], bool]
) -> SharedBatches | None:
    """The batches of the reader at the other end, once the other members are as far as this one; None where there are
    none for it, or once `is_stopping()`.
    """
    channel.say({"start": start, "stop": stop, "pid": os.getpid(), "data": stream.data.content_sha256})
    while not select.select([channel], [], [], LOOK_S)[0] and not is_stopping():
        pass
    answer: dict[str, Any] = {"alone": "it is to stop"} if is_stopping() else not_failed(channel.hear())
    if "alone" in answer:
        channel.close()
        log.info("This run reads the store for itself: %s", answer["alone"])
        return None
    log.info("One process reads the store for %d members", answer["sharing"])
    return SharedBatches(channel, stream, start, answer["descriptor"])


@contextmanager
def reader_watched() -> Iterator[None]:
    """A block that ends with one line and status EXIT_HANG where the process that reads for this one is gone."""
    try:
        yield
    except ReaderGone as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_HANG)
