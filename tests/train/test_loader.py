"""The loader gives what the stream defines, ahead of time; errors reach the caller; no thread is left behind."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from planted import HOOKPOINT, random_store, settings_of, write_documents, write_model

from extract.codecs import CODECS
from extract.errors import BadInput
from extract.shards import write_activations
from extract.stores import ActivationStore
from train.config import DataConfig
from train.data import ActivationPairs
from train.loader import RING, Loader
from train.stream import BatchStream

CPU = torch.device("cpu")


def open_pairs(folder, codecs=("bf16", "bf16"), num_documents=40):
    """The planted store, and its models in other codecs at another hookpoint."""
    store = folder / "store"
    random_store(store, num_documents)
    for model, codec in zip(("base", "tuned"), codecs, strict=True):
        source = ActivationStore(store / "activations" / model / HOOKPOINT)
        documents = ((key, source.document(i)) for i, key in enumerate(source.keys))
        write_activations(store, model, "block4", documents, codec=codec)
    settings = settings_of(folder)
    settings.hookpoint = "block4"
    return ActivationPairs.open(settings)


def stream_of(pairs, batch=16, lanes=5, window=20):
    return BatchStream(pairs, 3, batch, DataConfig(num_lanes=lanes, shuffle_window=window))


def loaded(stream, start, stop):
    with Loader(stream, start, stop, CPU, num_threads=2) as loader:
        return [batch.x_BMD.clone() for batch in loader]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def no_thread_survives():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("codecs", [(name, name) for name in CODECS] + [("bf16", "fp8"), ("int8", "fp16")])
def test_every_batch_is_the_rows_of_the_stream_as_documents_hold_them(tmp_path, codecs):
    """Three epochs; the slow form takes documents whole, through the safetensors format."""
    pairs = open_pairs(tmp_path, codecs, num_documents=20)
    everything = torch.cat([pairs.document(i)[0] for i in range(pairs.num_documents)])
    stream, batches = stream_of(pairs), loaded(stream_of(pairs), 0, 30)
    assert len(batches) == 30 > 2 * stream.steps_per_epoch
    plain = codecs[0] == codecs[1] and CODECS[codecs[0]].largest is None
    for step, x_BMD in enumerate(batches):
        assert x_BMD.dtype == (CODECS[codecs[0]].dtype if plain else torch.float32)
        assert torch.equal(x_BMD.float(), everything[stream.rows(step)])


@pytest.mark.parametrize(("lanes", "window", "batch"), [(64, 8192, 7), (1, 5, 64), (500, 3, 16), (7, 40, 200)])
def test_any_lanes_and_batches(pairs, lanes, window, batch):
    """More lanes than a batch has tokens or the store has shards, batches beyond a window, and the like."""
    batches = loaded(stream_of(pairs, batch, lanes, window), 2, 9)
    stream = stream_of(pairs, batch, lanes, window)
    assert len(batches) == 7
    for step, x_BMD in enumerate(batches, 2):
        assert torch.equal(x_BMD, stream.batch(step))


def test_a_store_with_fewer_tokens_than_lanes(tmp_path):
    write_documents(tmp_path / "store", [4, 5, 4])
    for model in ("base", "tuned"):
        write_model(tmp_path / "store", model, [4, 5, 4], lambda i, n: torch.arange(1.0, n + 1)[:, None] + 10 * i)
    settings = settings_of(tmp_path)
    settings.training.num_tokens_per_step, settings.data.heldout_fraction = 10, 0.0
    pairs = ActivationPairs.open(settings)
    values = torch.cat(loaded(BatchStream(pairs, 0, 10, settings.data), 0, 3))[:, 0, 0].tolist()
    once = [2, 3, 4, 12, 13, 14, 15, 22, 23, 24]  # first positions are dropped
    assert sorted(values) == sorted(once * 3)


def test_ranks_get_their_tokens_with_their_numbers(pairs):
    config = DataConfig(num_lanes=6, shuffle_window=20)
    whole = BatchStream(pairs, 3, 16, config)
    for rank in range(2):
        stream = BatchStream(pairs, 3, 16, config, rank, 2)
        with Loader(stream, 0, 30, CPU, num_threads=2) as loader:
            for step, (x_BMD, token_B, _) in enumerate(loader):
                assert torch.equal(x_BMD, whole.batch(step)[token_B])
                assert token_B.tolist() == stream.numbers(step).tolist()


def test_resuming_at_any_step_gives_the_same_batches(pairs):
    whole = loaded(stream_of(pairs), 0, 40)
    for start in (1, 17, 39):
        resumed = loaded(stream_of(pairs), start, 40)
        assert len(resumed) == 40 - start
        assert all(torch.equal(*both) for both in zip(resumed, whole[start:], strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (0, 1), (0, 2)])
def test_runs_shorter_than_the_ring(pairs, start, stop):
    assert len(loaded(stream_of(pairs), start, stop)) == stop - start


def test_a_batch_is_valid_until_the_next_one_is_asked_for(pairs):
    """However long the step takes, and however far the threads could run ahead meanwhile."""
    stream = stream_of(pairs)
    with Loader(stream_of(pairs), 0, 12, CPU, num_threads=2) as loader:
        for step, (x_BMD, _, _) in enumerate(loader):
            time.sleep(0.01)
            assert torch.equal(x_BMD, stream.batch(step))


class Watched:
    """A store's data that notes what the loader asks of it, and fails where it is told to."""

    def __init__(self, pairs, failing=None, seconds=0.0):
        self.pairs, self.failing, self.seconds, self.asked = pairs, failing, seconds, []

    def __getattr__(self, name):
        return getattr(self.pairs, name)

    def _note(self, name, argument):
        self.asked.append((name, argument))
        if name == self.failing:
            raise BadInput(f"{name} failed")

    def expect(self, spans):
        self._note("expect", list(spans))

    def fetch(self, span):
        self._note("fetch", span)
        self.pairs.fetch(span)

    def read(self, rows_B, into):
        self._note("read", rows_B)
        time.sleep(self.seconds)
        self.pairs.read(rows_B, into)


def test_batches_are_read_ahead_of_the_step_but_no_further_than_the_ring(pairs):
    watched = Watched(pairs)
    with Loader(stream_of(watched), 0, 30, CPU, num_threads=2) as loader:
        for step, _ in enumerate(loader):
            time.sleep(0.01)
            assert sum(name == "read" for name, _ in watched.asked) == min(30, step + RING)


def test_the_time_waited_is_that_of_reading_where_nothing_else_takes_time(pairs):
    with Loader(stream_of(Watched(pairs, seconds=0.03)), 0, 10, CPU, num_threads=2) as loader:
        assert sum(batch.waited for batch in loader) == pytest.approx(0.3, rel=0.3)
    with Loader(stream_of(Watched(pairs, seconds=0.005)), 0, 10, CPU, num_threads=2) as loader:
        waits = []
        for *_, waited in loader:
            time.sleep(0.03)
            waits.append(waited)
        assert sum(waits[1:]) < 0.03


def test_data_is_told_what_is_read_before_it_is_and_fetches_each_part_once(pairs):
    watched = Watched(pairs)
    stream = stream_of(watched, lanes=4, window=16)
    with Loader(stream, 0, 60, CPU, num_threads=1) as loader:
        for _ in loader:
            time.sleep(0.001)
    spans: list = []
    for name, argument in watched.asked:
        if name == "expect":
            spans = argument
        if name == "read":
            rows = [pairs.train_rows(span.shard)[span.first : span.stop] for span in spans]
            assert np.isin(argument, np.concatenate(rows)).all()
    fetched = [span for name, span in watched.asked if name == "fetch"]
    windows = {window for step in range(60) for window in stream.windows(step, 60)}
    assert len(fetched) == sum(len(stream.spans(window)) for window in windows)
    assert set(fetched) == {span for window in windows for span in stream.spans(window)}


@pytest.mark.parametrize("failing", ["expect", "fetch", "read"])
def test_what_goes_wrong_in_a_thread_is_raised_where_the_batch_is_asked_for(pairs, failing):
    with (
        pytest.raises(BadInput, match=f"{failing} failed"),
        Loader(stream_of(Watched(pairs, failing)), 0, 1000, CPU, num_threads=2) as loader,
    ):
        for _ in loader:
            pass


def test_it_says_whether_the_next_batch_is_there_without_an_error(pairs):
    with Loader(stream_of(Watched(pairs)), 0, 3, CPU, num_threads=1) as loader:
        seen = []
        for _ in loader:
            time.sleep(0.1)
            seen.append(loader.is_ready())
        assert seen == [True, True, False]
    with Loader(stream_of(Watched(pairs, seconds=0.2)), 0, 3, CPU, num_threads=1) as loader:
        next(iter(loader))
        assert not loader.is_ready()
    failing = Watched(pairs)
    with Loader(stream_of(failing), 0, 30, CPU, num_threads=1) as loader:
        batches = iter(loader)
        next(batches)
        failing.failing = "read"
        with pytest.raises(BadInput):
            while True:
                time.sleep(0.05)
                if not loader.is_ready():
                    next(batches)
                next(batches)


def test_leaving_early_stops_the_threads(pairs):
    """Checked for every test above and below; here the loop ends by an exception of its own."""
    with pytest.raises(ZeroDivisionError), Loader(stream_of(pairs), 0, 1000, CPU, num_threads=4) as loader:
        for _ in loader:
            raise ZeroDivisionError


class Waiting(Watched):
    """Data whose reads or fetches wait, from the third on, until everything is given up."""

    def __init__(self, pairs, waiting):
        super().__init__(pairs)
        self.waiting, self.given_up, self.at_it = waiting, threading.Event(), threading.Event()

    def expect(self, spans):
        super().expect(spans)
        if not spans:
            self.given_up.set()

    def _note(self, name, argument):
        super()._note(name, argument)
        if name == self.waiting and sum(asked == name for asked, _ in self.asked) > 2:
            self.at_it.set()
            if not self.given_up.wait(30):
                raise TimeoutError
            raise CancelledError


@pytest.mark.parametrize("waiting", ["read", "fetch"])
def test_leaving_gives_up_what_threads_wait_for(pairs, waiting):
    data, began = Waiting(pairs, waiting), time.monotonic()
    with Loader(stream_of(data), 0, 1000, CPU, num_threads=1) as loader:
        next(iter(loader))
        assert data.at_it.wait(30)
    assert time.monotonic() - began < 10 and data.given_up.is_set()


def test_a_batch_is_not_waited_for_once_the_run_is_to_stop(pairs):
    data, began = Waiting(pairs, "read"), time.monotonic()
    with Loader(stream_of(data), 0, 1000, CPU, 1, is_stopping=data.at_it.is_set) as loader:
        assert len(list(loader)) == 2  # what is there already is still given
    assert time.monotonic() - began < 10
