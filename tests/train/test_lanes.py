"""The order of tokens: every one once an epoch, lanes and windows as described, all of it arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from train.lanes import Lanes, ShardOrder, Span, Stretch, permutation

SIZES = [(1, 1, 1), (5, 8, 3), (64, 64, 8), (100, 7, 4), (1000, 64, 8192), (1000, 3, 50), (999, 10, 7)]


def entries_one_by_one(lanes, start, stop):
    """(epoch, lane, place) of each entry, from the description."""
    found = []
    for i in range(start, stop):
        epoch, j = divmod(i, lanes.num_tokens)
        found.append((epoch, j % lanes.num_lanes, j // lanes.num_lanes))
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_segments_are_equal_but_for_one_token_and_cover_all_places(sizes):
    lanes = Lanes(*sizes)
    covered = [list(range(lanes.start(lane), lanes.start(lane) + lanes.size(lane))) for lane in range(lanes.num_lanes)]
    assert sum(covered, []) == list(range(lanes.num_tokens))
    assert max(map(len, covered)) - min(map(len, covered)) <= 1


@pytest.mark.parametrize("sizes", SIZES)
def test_stretches_are_the_entries_grouped_by_epoch_and_lane(sizes):
    lanes = Lanes(*sizes)
    for start, stop in [
        (0, 1),
        (0, 10),
        (3, 3 + 2 * lanes.num_tokens),
        (7 * lanes.num_tokens - 2, 7 * lanes.num_tokens),
    ]:
        start = max(0, start)
        stretches = list(lanes.stretches(start, stop))
        flat = [(s.epoch, s.lane, place) for s in stretches for place in range(s.first, s.stop)]
        assert flat == sorted(entries_one_by_one(lanes, start, stop))
        assert all(s.stop <= lanes.size(s.lane) and len(s) > 0 for s in stretches)


@pytest.mark.parametrize("sizes", SIZES)
def test_windows_tile_each_segment(sizes):
    lanes = Lanes(*sizes)
    for lane in range(lanes.num_lanes):
        if not lanes.size(lane):
            continue
        window = lanes.window(3, lane, 0)
        places = []
        while window.epoch == 3:
            assert 0 < len(window) <= lanes.shuffle_window and window.lane == lane
            assert all(lanes.window(3, lane, place) == window for place in range(window.first, window.stop))
            places += range(window.first, window.stop)
            window = lanes.next_window(window)
        assert places == list(range(lanes.size(lane)))
        assert window == lanes.window(4, lane, 0)


def test_windows_of_long_segments_end_at_different_places_in_different_lanes():
    lanes = Lanes(num_tokens=8000, num_lanes=8, shuffle_window=80)
    assert sorted(lanes.window(0, lane, 0).stop for lane in range(8)) == [10, 20, 30, 40, 50, 60, 70, 80]


def test_a_segment_that_fits_a_window_is_one_window():
    lanes = Lanes(num_tokens=400, num_lanes=8, shuffle_window=50)
    assert {lanes.window(0, lane, 7) for lane in range(8)} == {Stretch(0, lane, 0, 50) for lane in range(8)}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_every_batch_and_every_token_of_an_epoch(num_ranks):
    """Entries i with i mod W = r: equal shares of any batch that W divides, and whole lanes within an epoch."""
    lanes, batch = Lanes(1001, 8, 20), 24
    for start in range(0, 3 * 1001, batch):
        shares = [sum(1 for i in range(start, start + batch) if i % num_ranks == rank) for rank in range(num_ranks)]
        assert set(shares) == {batch // num_ranks}
    for epoch in range(3):
        first = epoch * lanes.num_tokens
        rank_of = {
            (entry[1], i % num_ranks) for i, entry in enumerate(entries_one_by_one(lanes, first, first + 1001), first)
        }
        assert len(rank_of) == lanes.num_lanes


def test_shards_are_laid_end_to_end_in_their_order():
    counts = np.array([3, 0, 5, 1, 7])
    order = ShardOrder(seed=1, epoch=2, tokens_of_shards=counts)
    shards = permutation(5, 1, 2)
    laid = [(int(shard), token) for shard in shards for token in range(counts[shard])]
    for start in range(16):
        for stop in range(start + 1, 17):
            spans = order.spans(start, stop)
            assert [(s.shard, token) for s in spans for token in range(s.first, s.stop)] == laid[start:stop]
            assert len({s.shard for s in spans}) == len(spans)
    assert order.spans(0, 16) == [Span(int(s), 0, int(counts[s])) for s in shards if counts[s]]


def test_permutations_depend_on_seed_and_place_alone():
    orders = {
        place: tuple(permutation(50, *place))
        for place in [(0, 0), (1, 0), (0, 1), (0, 0, 0), (0, 0, 0, 0), (0, 0, 1, 0)]
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(permutation(50, 0, 1)) == orders[0, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1001, 1000, 803])
def test_stretches_of_a_rank_are_its_entries(num_ranks, num_tokens):
    """Entry i belongs to rank i mod W, in every epoch, whether or not W divides the tokens of one."""
    lanes, stop = Lanes(num_tokens, 8, 20), 3 * num_tokens
    of_ranks = [Lanes(num_tokens, 8, 20, rank, num_ranks) for rank in range(num_ranks)]
    for rank, own in enumerate(of_ranks):
        places = {(s.epoch, s.lane, p) for s in own.stretches(5, stop) for p in range(s.first, s.stop)}
        entries = zip(range(5, stop), entries_one_by_one(lanes, 5, stop), strict=True)
        assert places == {entry for i, entry in entries if i % num_ranks == rank}
        assert all(own.rank_of(epoch, lane) == rank for epoch, lane, _ in places)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_next_windows_stay_with_the_rank_and_name_each_once(num_ranks):
    for rank in range(num_ranks):
        lanes = Lanes(1001, 8, 20, rank, num_ranks)
        windows = {lanes.window(e, lane, p) for e in range(3) for lane in lanes.own(e) for p in range(lanes.size(lane))}
        following = [lanes.next_window(window) for window in windows if window.epoch < 2]
        first = {lanes.window(0, lane, 0) for lane in lanes.own(0)}
        assert len(set(following)) == len(following)
        assert set(following) - windows == set()
        assert {window for window in windows if window.epoch < 2} - set(following) == first
        assert all(lanes.next_window(lanes.window_before(window)) == window for window in windows - first)
        assert all(lanes.window_before(window) is None for window in first)
