"""How many shards are held at a time, against what the stream of batches asks for."""

from __future__ import annotations

import numpy as np
import pytest

from train import residency
from train.config import DataConfig
from train.lanes import Lanes
from train.residency import Hold, Peak, holds, host_memory, peak
from train.stream import BatchStream


class Shards:
    """Shards of one document each, as a stream of batches sees them."""

    def __init__(self, kept: np.ndarray):
        self.tokens, self.train_tokens = self, kept

    def shard_documents(self) -> list[range]:
        return [range(i, i + 1) for i in range(len(self.train_tokens))]


def asked_for(kept: np.ndarray, batch: int, config: DataConfig, num_steps: int, *of_ranks: int) -> list[set[int]]:
    """The shards that the stream of batches asks for in every step."""
    stream = BatchStream(Shards(kept), 4, batch, config, *of_ranks)
    windows = (stream.windows(step, num_steps) for step in range(num_steps))
    return [{span.shard for window in every for span in stream.spans(window)} for every in windows]


@pytest.mark.parametrize("batch", [4, 10, 64])
@pytest.mark.parametrize(("num_lanes", "window", "num_shards"), [(3, 8, 12), (4, 50, 5), (1, 7, 6), (5, 16, 40)])
def test_what_is_held_is_what_the_stream_of_batches_asks_for(num_lanes, window, num_shards, batch):
    kept = np.random.default_rng(num_shards).integers(5, 30, num_shards)
    lanes = Lanes(int(kept.sum()), num_lanes, window)
    num_steps = 3 * int(kept.sum()) // batch  # three epochs, to no batch's end
    steps = asked_for(kept, batch, DataConfig(num_lanes=num_lanes, shuffle_window=window), num_steps)
    found = [set() for _ in steps]
    for hold in holds(lanes, 4, kept, batch, num_steps):
        for step in range(hold.first, hold.stop):
            found[step].add(hold.shard)
    assert found == steps
    tokens = kept + 3
    most, shards = max((int(tokens[list(shards)].sum()), len(shards)) for shards in steps)
    assert peak(holds(lanes, 4, kept, batch, num_steps), tokens) == Peak(shards, most)


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize(("num_lanes", "window", "num_shards"), [(4, 8, 12), (4, 50, 5), (8, 16, 40)])
def test_what_a_rank_holds_is_what_its_stream_asks_for(num_lanes, window, num_shards, batch):
    kept = np.random.default_rng(num_shards).integers(5, 30, num_shards)
    num_steps = 3 * int(kept.sum()) // batch
    for rank in range(4):
        lanes = Lanes(int(kept.sum()), num_lanes, window, rank, 4)
        steps = asked_for(kept, batch, DataConfig(num_lanes=num_lanes, shuffle_window=window), num_steps, rank, 4)
        found = [set() for _ in steps]
        for hold in holds(lanes, 4, kept, batch, num_steps):
            for step in range(hold.first, hold.stop):
                found[step].add(hold.shard)
        assert found == steps


def test_shards_that_two_lanes_hold_count_once():
    held = [Hold(0, 0, 5), Hold(1, 2, 4), Hold(0, 3, 9), Hold(0, 9, 10), Hold(2, 8, 9)]
    assert peak(iter(held), np.array([10, 3, 4])) == Peak(2, 14)


def test_the_peak_is_one_moment():
    """Three shards of 9 tokens at first, then one of 50: what is stated together was held together."""
    held = [Hold(0, 0, 2), Hold(1, 0, 2), Hold(2, 0, 2), Hold(3, 2, 4)]
    assert peak(iter(held), np.array([3, 3, 3, 50])) == Peak(1, 50)


def test_few_large_lanes_hold_few_shards():
    """Of 100 equal shards, 5 lanes hold 5 or, where windows cross borders, a few more; never the whole store."""
    kept = np.full(100, 1000)
    most = peak(holds(Lanes(100_000, 5, 100), 0, kept, 64, 1562), kept)
    assert 5 <= most.shards <= 10 and most.tokens == 1000 * most.shards


def test_a_containers_limit_is_the_hosts_memory(tmp_path, monkeypatch):
    whole = host_memory()
    assert whole > 2**28
    for stated, expected in ((str(2**27), 2**27), ("max", whole), (str(2**70), whole)):
        (tmp_path / "memory.max").write_text(stated + "\n")
        monkeypatch.setattr(residency, "LIMITS", (tmp_path / "missing", tmp_path / "memory.max"))
        assert host_memory() == expected
