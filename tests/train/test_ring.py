"""Members get from a reader, bit for bit, what they would read; nobody waits for one that is gone; nothing stays."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from planted import HOOKPOINT, random_store, settings_of

from extract.codecs import decode
from extract.errors import BadInput
from extract.shards import write_activations
from extract.stores import ActivationStore
from train.config import DataConfig
from train.data import ActivationPairs
from train.loader import RING, Loader
from train.reader import Members, Orphaned, serve, starting_together
from train.ring import AHEAD, SLOTS, Channel, ReaderGone, Ring, joined, ring_memory
from train.stream import BatchStream

CPU, BATCH = torch.device("cpu"), 16


def open_pairs(folder, codecs=("bf16", "bf16")):
    """The planted store, with its models in other codecs at another hookpoint."""
    random_store(folder / "store", 20)
    for model, codec in zip(("base", "tuned"), codecs, strict=True):
        source = ActivationStore(folder / "store" / "activations" / model / HOOKPOINT)
        documents = ((key, source.document(i)) for i, key in enumerate(source.keys))
        write_activations(folder / "store", model, "block4", documents, codec=codec)
    settings = settings_of(folder)
    settings.hookpoint = "block4"
    return ActivationPairs.open(settings)


def stream_of(data):
    return BatchStream(data, 3, BATCH, DataConfig(num_lanes=5, shuffle_window=20))


class Counted:
    """Data that counts the tokens read, raises `error` after some reads, and takes its time for each."""

    def __init__(self, pairs, error=None, after=0, seconds=0.0):
        self._pairs, self._error, self._after, self._seconds = pairs, error, after, seconds
        self.num_tokens = self.reads = 0

    def __getattr__(self, name):
        return getattr(self._pairs, name)

    def read(self, rows_B, into):
        if self._error and self.reads >= self._after:
            raise self._error
        self.reads, self.num_tokens = self.reads + 1, self.num_tokens + len(rows_B)
        time.sleep(self._seconds)
        self._pairs.read(rows_B, into)


class Unread(Counted):
    """Data of a member that is fed: it must not be read."""

    def __init__(self, pairs):
        super().__init__(pairs, AssertionError("a member read for itself"))


@contextmanager
def reader(data, num_members, raises=()):
    """The members' ends of sockets to a reader of `data`, which ends by itself with what it `raises`, and the file
    descriptor that says that whoever started it lives.
    """
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(num_members)]
    watched, lifeline = os.pipe()
    members = Members([own for own, _ in pairs], watched)
    failed = []

    def run():
        try:
            serve(members, lambda: stream_of(data), 2)
        except raises as error:
            failed.append(error)
        finally:
            for member in list(members.present):
                member.channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    channels = [Channel(end) for _, end in pairs]
    try:
        yield channels, lifeline
    finally:
        for channel in channels:  # of a member that failed: the others have closed theirs
            channel.close()
        thread.join(30)
        for descriptor in (watched, lifeline):
            try:
                os.close(descriptor)
            except OSError:
                continue
    assert not thread.is_alive() and len(failed) == bool(raises)


def member(channel, data, start, stop, seconds=0.0, after=lambda step: None):
    """The batches of a member of which each step takes `seconds`, copied at the end of the step."""
    stream, batches = stream_of(data), []
    source = joined(channel, stream, start, stop, lambda: False)
    with Loader(stream, start, stop, CPU, 1, source=source) as loader:
        for step, (x_BMD, token_B, _) in enumerate(loader, start):
            assert token_B is None
            time.sleep(seconds)
            after(step)
            batches.append(x_BMD.clone())
    return batches


def all_of(calls):
    """The results of calls that go on side by side."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(60) for future in [threads.submit(*call) for call in calls]]


def assert_own(pairs, start, batches, stop):
    """Exactly what each step's batch is when read without a reader and its loader."""
    stream = stream_of(pairs)
    assert len(batches) == stop - start
    for step, x_BMD in enumerate(batches, start):
        expected = stream.batch(step)
        assert x_BMD.dtype == expected.dtype and torch.equal(bits(x_BMD), bits(expected))


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("fp8", "fp8"), ("int8", "fp16")])
def test_members_get_what_they_would_read_and_it_is_read_once(tmp_path, codecs):
    """Three epochs; one member starts late within the ring, one stops early, one is slow."""
    pairs = open_pairs(tmp_path, codecs)
    data, spans = Counted(pairs), [(0, 40, 0.0), (3, 40, 0.003), (0, 25, 0.0)]
    with reader(data, 3) as (channels, _):
        calls = [(member, channel, Unread(pairs), *span) for channel, span in zip(channels, spans, strict=True)]
        found = all_of(calls)
    for (start, stop, _), batches in zip(spans, found, strict=True):
        assert_own(pairs, start, batches, stop)
    assert 2 * stream_of(pairs).steps_per_epoch < 40
    assert data.reads == 40 and data.num_tokens == 40 * BATCH


def test_members_at_other_steps_read_for_themselves_and_say_why(pairs, caplog):
    caplog.set_level(logging.INFO)
    data, far = Counted(pairs), Counted(pairs)
    with reader(data, 3) as (channels, _):
        calls = [(member, channels[0], Unread(pairs), 0, 12), (member, channels[1], far, 20, 30)]
        first, other, third = all_of([*calls, (member, channels[2], Unread(pairs), 0, 12)])
    assert_own(pairs, 0, first, 12), assert_own(pairs, 20, other, 30), assert_own(pairs, 0, third, 12)
    assert data.num_tokens == 12 * BATCH and far.num_tokens == 10 * BATCH
    assert "for itself: no others start at step 20, or less than 11 steps from it" in caplog.text
    assert caplog.text.count("One process reads the store for 2 members") == 2


def test_of_members_at_different_steps_none_is_fed(pairs):
    data, own = Counted(pairs), Counted(pairs)
    with reader(data, 2) as (channels, _):
        all_of([(member, channels[0], own, 0, 5), (member, channels[1], own, 90, 95)])
    assert data.reads == 0 and own.reads == 10


def test_a_member_that_finds_other_data_reads_for_itself(pairs, tmp_path):
    other = open_pairs(tmp_path, ("fp32", "fp32"))
    data, own = Counted(pairs), Counted(other)
    with reader(data, 3) as (channels, _):
        calls = [(member, channel, Unread(pairs), 0, 12) for channel in channels[:2]]
        *_, found = all_of([*calls, (member, channels[2], own, 0, 12)])
    assert_own(other, 0, found, 12)
    assert data.reads == 12 and own.reads == 12


@pytest.mark.parametrize(
    ("starts", "expected"),
    [([], 0), ([5], 5), ([0, 0, 40], 0), ([10, 0], 0), ([11, 0], 0), ([40, 41, 0], 40), ([13, 12, 4, 3, 1], 3)],
)
def test_those_are_fed_that_start_near_each_other(starts, expected):
    found = starting_together(starts)
    assert found.start == expected and len(found) in (0, AHEAD) and AHEAD == 11


def test_nobody_is_further_ahead_of_the_slowest_than_the_ring_is_long(pairs):
    """While one is in step 5, the other takes what the ring holds, and then waits; the batch at hand stays as it is."""
    taken = []

    def wait(step):
        end_at = time.monotonic() + 30
        while step == 5 and len(taken) < 5 + SLOTS - RING:
            assert time.monotonic() < end_at
            time.sleep(0.01)
        if step == 5:
            time.sleep(0.3)
            assert len(taken) <= 5 + SLOTS

    with reader(Counted(pairs), 2) as (channels, _):
        slow = (member, channels[0], Unread(pairs), 0, 30, 0.0, wait)
        slowly, quickly = all_of([slow, (member, channels[1], Unread(pairs), 0, 30, 0.0, taken.append)])
    assert_own(pairs, 0, slowly, 30), assert_own(pairs, 0, quickly, 30)


def test_a_member_that_leaves_in_the_middle_holds_up_nobody(pairs):
    def leave(step):
        if step == 4:
            raise ZeroDivisionError

    def leaving(channel):
        with pytest.raises(ZeroDivisionError):
            member(channel, Unread(pairs), 0, 200, after=leave)

    with reader(Counted(pairs), 3) as (channels, _):
        found, *_ = all_of([(member, channels[0], Unread(pairs), 0, 60), (leaving, channels[1]), (channels[2].close,)])
    assert_own(pairs, 0, found, 60)


def test_a_wait_for_the_slow_ends_where_a_member_is_to_stop(pairs):
    """One is in a step that ends when the other, which is asked to stop meanwhile, has left."""
    stopping, left, taken = threading.Event(), threading.Event(), []

    def stopped(channel):
        stream = stream_of(Unread(pairs))
        source = joined(channel, stream, 0, 200, lambda: False)
        with Loader(stream, 0, 200, CPU, 1, stopping.is_set, source) as loader:
            taken.extend(loader)
        left.set()

    def wait(step):
        if step == 5:
            stopping.set()
            assert left.wait(30)

    with reader(Counted(pairs), 2) as (channels, _):
        slow, _ = all_of([(member, channels[0], Unread(pairs), 0, 20, 0.0, wait), (stopped, channels[1])])
    assert_own(pairs, 0, slow, 20)
    assert len(taken) < 5 + AHEAD


def test_a_member_that_is_to_stop_does_not_wait_for_others_to_come(pairs):
    with reader(Counted(pairs), 2) as (channels, _):
        began = time.monotonic()
        assert joined(channels[0], stream_of(pairs), 0, 9, lambda: True) is None
        assert time.monotonic() - began < 5
        channels[1].close()


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (BadInput("shard 3 is damaged"), BadInput, "^shard 3 is damaged$"),
        (OSError("the disk is gone"), ReaderGone, "failed: the disk is gone. Steps that were done are saved"),
    ],
)
def test_what_fails_in_the_reader_every_member_is_told(pairs, error, raised, text):
    def failing(channel):
        taken = []
        with pytest.raises(raised, match=text):
            member(channel, Unread(pairs), 0, 50, after=taken.append)
        return taken

    with reader(Counted(pairs, error, after=9), 3, type(error)) as (channels, _):
        assert all_of([(failing, channel) for channel in channels]) == [list(range(9))] * 3


def test_a_reader_whose_starter_is_gone_ends_its_members(pairs):
    def failing(channel, after):
        with pytest.raises(ReaderGone, match="failed: what started it was killed"):
            member(channel, Unread(pairs), 0, 10_000, after=after)

    with reader(Counted(pairs), 2, Orphaned) as (channels, lifeline):
        end = lambda step: os.close(lifeline) if step == 30 else None  # noqa: E731
        all_of([(failing, channels[0], end), (failing, channels[1], lambda step: None)])


def test_a_reader_that_is_killed_is_an_error_of_its_members(pairs):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with pytest.raises(ReaderGone, match="reads for the members of this sweep was killed. Steps"):
        joined(Channel(ours), stream_of(pairs), 0, 9, lambda: False)
    ours.close()


def test_the_ring_is_gone_with_those_who_have_it(pairs):
    """It has no name in any file system, so nothing has to be removed."""
    named, before, like = sorted(os.listdir("/dev/shm")), maps(), pairs.buffer(BATCH)  # noqa: PTH208
    descriptor = ring_memory(like)
    rings = [Ring(os.dup(descriptor), like), Ring(descriptor, like)]
    rings[0].slot(3).codes_ND.fill_(2)
    assert (rings[1].slot(3 + SLOTS).codes_ND == 2).all() and (rings[1].slot(4).codes_ND == 0).all()
    assert len(maps() - before) == 2 and sorted(os.listdir("/dev/shm")) == named  # noqa: PTH208
    rings.clear()
    assert maps() <= before


def maps():
    """Where this process sees rings."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:crossdiff" in line}


def test_buffers_of_a_ring_do_not_touch_each_other(tmp_path):
    pairs = open_pairs(tmp_path, ("int8", "int8"))
    like = pairs.buffer(BATCH)
    ring = Ring(ring_memory(like), like)
    for step in range(SLOTS):
        ring.slot(step).codes_ND.fill_(step)
        ring.slot(step).scales_N.fill_(10.0 + step)
    for step in range(SLOTS):
        assert (ring.slot(step).codes_ND == step).all() and (ring.slot(step).scales_N == 10 + step).all()


def test_a_buffer_that_is_given_takes_a_copy_and_frees_the_ring(pairs):
    """As on a GPU, where it is pinned. No batch is held, so none keeps the reader from going on."""
    with reader(Counted(pairs), 2) as (channels, _):
        streams = [stream_of(Unread(pairs)) for _ in channels]
        calls = [(joined, *each, 0, 3 * SLOTS, lambda: False) for each in zip(channels, streams, strict=True)]
        sources = all_of(calls)
        buffer, stream = pairs.buffer(BATCH), stream_of(pairs)
        for step in range(3 * SLOTS):
            for source in sources:
                assert source.buffer() is None and source.read(step, buffer) is buffer
                assert torch.equal(decode(buffer).view(BATCH, 2, -1), stream.batch(step))
        for source in sources:
            source.close()


def test_a_batch_in_the_ring_is_not_copied(pairs):
    with reader(Counted(pairs), 2) as (channels, _):
        calls = [(joined, channel, stream_of(Unread(pairs)), 0, 40, lambda: False) for channel in channels]
        sources = all_of(calls)
        places = [[source.read(step, None).codes_ND.data_ptr() for source in sources] for step in range(40)]
        for source in sources:
            source.close()
    first, second = zip(*places, strict=True)
    assert len(set(first)) == len(set(second)) == SLOTS and first[:SLOTS] * 5 == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_members_on_a_gpu_get_what_they_would_read(pairs):
    def on_gpu(channel):
        stream, device = stream_of(pairs), torch.device("cuda")
        source = joined(channel, stream, 0, 40, lambda: False)
        with Loader(stream, 0, 40, device, 1, source=source) as loader:
            return [batch.x_BMD.cpu() for batch in loader]

    with reader(Counted(pairs), 2) as (channels, _):
        for batches in all_of([(on_gpu, channel) for channel in channels]):
            assert_own(pairs, 0, batches, 40)
