"""Batches of the run, against the order written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted import random_store, settings_of, write_documents, write_model

from train.config import DataConfig
from train.data import ActivationPairs
from train.lanes import Lanes, ShardOrder, permutation
from train.mixing import documents_in_batches, expected_documents, mixing
from train.stream import BatchStream

ORDERS = [(64, 8192, 7), (5, 20, 16), (8, 16, 50), (3, 1000, 1), (1, 10_000, 33), (1000, 4, 8)]  # lanes, window, batch


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    random_store(folder / "store")
    return ActivationPairs.open(settings_of(folder))


def stream_of(pairs, lanes=5, window=20, batch=16, seed=3):
    return BatchStream(pairs, seed, batch, DataConfig(num_lanes=lanes, shuffle_window=window))


def order_of_epoch(pairs, seed, epoch, lanes, window):
    """All rows of an epoch in the order of their entries, written out as the module describes it."""
    shards = permutation(len(pairs.tokens.shard_documents()), seed, epoch)
    places = np.concatenate([pairs.train_rows(int(shard)) for shard in shards])
    total, start, streams = len(places), 0, []
    for lane in range(lanes):
        size = total // lanes + (lane < total % lanes)
        segment, start = places[start : start + size], start + size
        ahead = lane * window // lanes if size > window else 0
        borders = sorted({0, size, *range(window - ahead, size, window)})
        pieces = [
            segment[a:b][permutation(b - a, seed, epoch, lane, a)] for a, b in zip(borders, borders[1:], strict=False)
        ]
        streams.append(np.concatenate(pieces) if pieces else segment)
    return [int(streams[j % lanes][j // lanes]) for j in range(total)]


@pytest.mark.parametrize(("lanes", "window", "batch"), ORDERS)
def test_batches_are_the_written_out_order_cut_into_pieces(pairs, lanes, window, batch):
    stream = stream_of(pairs, lanes, window, batch)
    sequence = [row for epoch in range(3) for row in order_of_epoch(pairs, 3, epoch, lanes, window)]
    for step in range(len(sequence) // batch):
        assert stream.rows(step).tolist() == sorted(sequence[step * batch : (step + 1) * batch])


@pytest.mark.parametrize(("lanes", "window", "batch"), ORDERS)
def test_each_kept_training_token_comes_once_an_epoch_in_another_order_each(pairs, lanes, window, batch):
    total = int(pairs.train_tokens.sum())
    tokens = [row for shard in range(pairs.tokens.num_shards) for row in pairs.train_rows(shard)]
    assert len(tokens) == total
    stream = stream_of(pairs, lanes, window, batch=1)
    epochs = [[int(stream.rows(entry)[0]) for entry in range(e * total, (e + 1) * total)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == tokens
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert np.mean(np.array(epochs[one]) == np.array(epochs[other])) < 0.15


def test_a_batch_is_a_pure_function_of_seed_and_step(pairs):
    """So a run that resumes at step n reads what an uninterrupted one reads."""
    stream = stream_of(pairs)
    forwards = [stream.rows(step) for step in range(100)]
    for step in (99, 0, 57, 8, 57):
        assert np.array_equal(stream_of(pairs).rows(step), forwards[step])
        assert np.array_equal(stream.rows(step), forwards[step])
    assert any(not np.array_equal(stream_of(pairs, seed=4).rows(step), forwards[step]) for step in range(3))


def test_batches_hold_the_activations_of_their_rows(pairs):
    everything = torch.cat([pairs.document(i)[0] for i in range(pairs.num_documents)])
    stream = stream_of(pairs, batch=64)
    for step in range(5):
        batch = stream.batch(step)
        assert batch.dtype == torch.bfloat16
        assert torch.equal(batch.float(), everything[stream.rows(step)])


@pytest.mark.parametrize(("lanes", "window", "batch"), ORDERS)
def test_windows_and_their_spans_hold_the_rows_of_the_step_and_what_lanes_read_next(pairs, lanes, window, batch):
    stream = stream_of(pairs, lanes, window, batch)
    stop = 2 * stream.steps_per_epoch
    for step in range(0, stop, max(1, stream.steps_per_epoch // 20)):
        spans = [span for each in stream.windows(step, stop) for span in stream.spans(each)]
        held = {row for span in spans for row in pairs.train_rows(span.shard)[span.first : span.stop].tolist()}
        assert held >= set(stream.rows(step).tolist())
        if batch <= window and step + 1 < stop:  # then no lane gets further than its next window
            assert held >= set(stream.rows(step + 1).tolist())


@pytest.mark.parametrize(("lanes", "window", "batch"), ORDERS)
def test_no_window_is_named_that_the_run_ends_before(pairs, lanes, window, batch):
    """Those of a run are the windows of the rows it reads, and no others, in the first epoch and in the third."""
    for stop in (1, 2 * stream_of(pairs, lanes, window, batch).steps_per_epoch + 2):
        stream = stream_of(pairs, lanes, window, batch)
        named = {each for step in range(stop) for each in stream.windows(step, stop)}
        read = {each for step in range(stop) for _, each in stream._pieces(stream._lanes, step, batch)}
        assert named == read


def documents_of(pairs, rows):
    return len(set((np.searchsorted(pairs.tokens.row_starts, rows, side="right") - 1).tolist()))


def test_expected_documents_are_those_of_random_draws():
    """Three documents of 2, 3 and 5 tokens, B = 2: 1 - C(8,2)/45, 1 - C(7,2)/45, 1 - C(5,2)/45; B = 9 misses none."""
    counts = np.array([2, 0, 3, 5])
    assert expected_documents(counts, 2) == pytest.approx((17 + 24 + 35) / 45)
    assert expected_documents(counts, 9) == pytest.approx(3)
    assert expected_documents(np.full(200_000, 1000), 2048) == pytest.approx(
        200_000 * (1 - (1 - 1 / 200_000) ** 2048), 1e-3
    )


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """120 documents of 40 tokens, all kept, in shards of 3."""
    folder = tmp_path_factory.mktemp("long")
    write_documents(folder / "store", [40] * 120)
    for model in ("base", "tuned"):
        write_model(folder / "store", model, [40] * 120, lambda i, n: torch.ones(n, 2), skip=0)
    settings = settings_of(folder)
    settings.data.heldout_fraction, settings.kept.skip_first_tokens = 0.0, 0
    return ActivationPairs.open(settings)


def expected_of_windows(pairs, lanes, seed, start, stop):
    """Distinct documents in entries [start, stop) if windows were shuffled by chance: of the S tokens of a window b are
    drawn without replacement, so document d is absent with probability prod_windows C(S - n_d, b) / C(S, b).
    """
    absent: dict[int, float] = {}
    counts = [len(pairs.train_rows(shard)) for shard in range(pairs.tokens.num_shards)]
    for stretch in lanes.stretches(start, stop):
        order = ShardOrder(seed, stretch.epoch, np.array(counts))
        places = range(stretch.first, stretch.stop)
        for window in {lanes.window(stretch.epoch, stretch.lane, place) for place in places}:
            drawn = sum(window.first <= place < window.stop for place in places)
            first = lanes.start(window.lane)
            spans = order.spans(first + window.first, first + window.stop)
            rows = np.concatenate([pairs.train_rows(span.shard)[span.first : span.stop] for span in spans])
            documents, held = np.unique(
                np.searchsorted(pairs.tokens.row_starts, rows, side="right"), return_counts=True
            )
            for document, n in zip(documents.tolist(), held.tolist(), strict=True):
                missed = math.comb(len(window) - n, drawn) / math.comb(len(window), drawn)
                absent[document] = absent.get(document, 1.0) * missed
    return sum(1 - missed for missed in absent.values())


@pytest.mark.parametrize(("lanes", "window", "batch"), [(4, 80, 32), (6, 200, 50), (2, 400, 64), (16, 8192, 48)])
def test_a_batch_mixes_as_many_documents_as_a_shuffle_of_its_windows_would(long, lanes, window, batch):
    stream = stream_of(long, lanes, window, batch)
    steps = range(2 * stream.steps_per_epoch)
    counts = [documents_of(long, stream.rows(step)) for step in steps]
    order = Lanes(4800, lanes, window)
    expected = [expected_of_windows(long, order, 3, step * batch, step * batch + batch) for step in steps]
    excess = np.array(counts) - expected
    assert abs(excess.mean()) < 4 * excess.std() / len(steps) ** 0.5
    assert documents_in_batches(stream) == pytest.approx(np.mean(counts), rel=0.2)


def test_one_lane_with_one_window_is_a_full_shuffle(long):
    stream = stream_of(long, lanes=1, window=10_000, batch=48)
    counts = [documents_of(long, stream.rows(step)) for step in range(100)]
    expected = expected_documents(long.train_tokens, 48)
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / 10)
    line = mixing(stream)
    assert line.startswith("1 lanes shuffle 10000 tokens each: a batch of 48 tokens holds 4")
    assert line.endswith(f"of a full shuffle it would hold {expected:.0f}")


def test_where_a_step_lies(pairs):
    total = int(pairs.train_tokens.sum())
    stream = stream_of(pairs, batch=10)
    step = total // 10 + 1
    assert stream.describe(step) == f"tokens {step * 10} to {step * 10 + 10} of the run, epoch 1"


RANKS = [(8, 20, 16, 2), (8, 20, 16, 8), (4, 1000, 12, 4), (6, 7, 30, 3), (8, 16, 800, 4)]  # the last: beyond an epoch


@pytest.mark.parametrize(("lanes", "window", "batch", "num_ranks"), RANKS)
def test_ranks_read_parts_of_the_batch_and_know_their_numbers_in_it(pairs, lanes, window, batch, num_ranks):
    config = DataConfig(num_lanes=lanes, shuffle_window=window)
    whole = BatchStream(pairs, 3, batch, config)
    ranks = [BatchStream(pairs, 3, batch, config, rank, num_ranks) for rank in range(num_ranks)]
    entries = BatchStream(pairs, 3, 1, config)  # entry by entry
    for step in [0, 1, whole.steps_per_epoch, 2 * whole.steps_per_epoch + 1]:
        expected = whole.rows(step)
        assert whole.numbers(step).tolist() == list(range(batch))
        numbers = [stream.numbers(step) for stream in ranks]
        assert sorted(np.concatenate(numbers).tolist()) == list(range(batch))
        for rank, stream in enumerate(ranks):
            assert np.array_equal(stream.rows(step), expected[numbers[rank]])
            own = [entries.rows(i)[0] for i in range(step * batch, (step + 1) * batch) if i % num_ranks == rank]
            assert sorted(own) == stream.rows(step).tolist()
            assert np.array_equal(stream.plan(step), expected)
            assert stream.batch(step).shape == (stream.num_own_tokens, 2, 6)


@pytest.mark.parametrize(("lanes", "window", "batch", "num_ranks"), RANKS)
def test_windows_of_a_rank_are_those_that_it_reads(pairs, lanes, window, batch, num_ranks):
    for rank in range(num_ranks):
        stream = BatchStream(pairs, 3, batch, DataConfig(num_lanes=lanes, shuffle_window=window), rank, num_ranks)
        stop = 2 * stream.steps_per_epoch + 2
        named = {each for step in range(stop) for each in stream.windows(step, stop)}
        assert named == {each for step in range(stop) for _, each in stream._pieces(stream._lanes, step, batch)}
        for step in range(stop):
            spans = [span for each in stream.windows(step, stop) for span in stream.spans(each)]
            held = {row for span in spans for row in pairs.train_rows(span.shard)[span.first : span.stop].tolist()}
            assert held >= set(stream.rows(step).tolist())
