"""The order of training tokens, as arithmetic on integers.

T kept training tokens are visited once an epoch: entry i of a run is entry j = i mod T of epoch e = i div T. In an
epoch

1. the shards are permuted, a pure function of (seed, e), and their kept training tokens laid end to end at places
   0 ... T-1;
2. the places are cut into `num_lanes` segments; lane l owns T div num_lanes of them, the first T mod num_lanes lanes
   one more;
3. the tokens of every window of a segment are permuted, a pure function of (seed, e, l, window);
4. entry j is token j div num_lanes of lane j mod num_lanes.

So an epoch is a permutation of all tokens, a batch mixes the windows of all lanes, and reading stays within num_lanes
windows at a time. Windows have `shuffle_window` tokens; their borders differ from lane to lane, so that the lanes reach
new windows one after another, not all in the same step.

The order does not depend on the number of ranks. Rank r of W takes the entries i of the run with i mod W = r: where W
divides num_lanes these are whole lanes in every epoch (others in each, unless W divides T), and its share of any batch
is exact where W divides the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """The kept training tokens [first, stop) of a shard, counted from 0 in the order of the store."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Stretch:
    """Places [first, stop) of a lane's segment in an epoch."""

    epoch: int
    lane: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Lanes:
    """Entries of the run to places in the segments of lanes; those of rank `rank` of `num_ranks`, which divides
    `num_lanes`.
    """

    num_tokens: int
    num_lanes: int
    shuffle_window: int
    rank: int = 0
    num_ranks: int = 1

    def start(self, lane: int) -> int:
        """The first place of a lane's segment."""
        return lane * (self.num_tokens // self.num_lanes) + min(lane, self.num_tokens % self.num_lanes)

    def size(self, lane: int) -> int:
        """The number of places in a lane's segment, the same in every epoch."""
        return self.start(lane + 1) - self.start(lane)

    def rank_of(self, epoch: int, lane: int) -> int:
        """The rank that reads a lane in an epoch."""
        return (epoch * self.num_tokens + lane) % self.num_ranks

    def own(self, epoch: int) -> range:
        """The lanes of this rank in an epoch."""
        return range((self.rank - epoch * self.num_tokens) % self.num_ranks, self.num_lanes, self.num_ranks)

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """What entries [start, stop) of the run take of each lane of this rank, epoch by epoch, lane by lane."""
        while start < stop:
            epoch, first = divmod(start, self.num_tokens)
            last = min(self.num_tokens, first + stop - start)
            for lane in self.own(epoch):
                stretch = Stretch(epoch, lane, self._before(lane, first), self._before(lane, last))
                if len(stretch):
                    yield stretch
            start += last - first

    def window(self, epoch: int, lane: int, place: int) -> Stretch:
        """The window that holds a place of a lane's segment."""
        size, width = self.size(lane), self.shuffle_window
        ahead = lane * width // self.num_lanes if size > width else 0  # a segment of one window is not cut in two
        first = (place + ahead) // width * width - ahead
        return Stretch(epoch, lane, max(0, first), min(size, first + width))

    def entry(self, epoch: int, lane: int, place: int) -> int:
        """The entry of the run that is `place` of a lane's segment (before the window permutes them)."""
        return epoch * self.num_tokens + place * self.num_lanes + lane

    def next_window(self, window: Stretch) -> Stretch:
        """The window that a rank reads after `window` of a lane: at the end of the segment the first of the next epoch,
        of the lane or, where others are the rank's then, of one beside it.
        """
        if window.stop < self.size(window.lane):
            return self.window(window.epoch, window.lane, window.stop)
        return self.window(window.epoch + 1, self._beside(window.lane, -self.num_tokens), 0)

    def window_before(self, window: Stretch) -> Stretch | None:
        """The window of which `window` is the next; None for the first ones of a run."""
        if window.first:
            return self.window(window.epoch, window.lane, window.first - 1)
        if window.epoch == 0:
            return None
        lane = self._beside(window.lane, self.num_tokens)
        return self.window(window.epoch - 1, lane, self.size(lane) - 1)

    def _beside(self, lane: int, steps: int) -> int:
        """The lane `steps` further, cyclically among the `num_ranks` that begin with a multiple of that."""
        return lane // self.num_ranks * self.num_ranks + (lane + steps) % self.num_ranks

    def _before(self, lane: int, entry: int) -> int:
        """How many of the entries [0, entry) of an epoch are the lane's."""
        return max(0, -(-(entry - lane) // self.num_lanes))


class ShardOrder:
    """The shards of one epoch in their order, and which of their tokens lie at given places."""

    def __init__(self, seed: int, epoch: int, tokens_of_shards: np.ndarray):
        self._shards = permutation(len(tokens_of_shards), seed, epoch)
        self._starts = np.concatenate([[0], np.cumsum(tokens_of_shards[self._shards])])

    def spans(self, start: int, stop: int) -> list[Span]:
        """The parts of shards at places [start, stop) of the epoch, in order."""
        found = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, end = self._starts[number : number + 2].tolist()
            if begin <= start < end:
                found.append(Span(int(self._shards[number]), start - begin, min(stop, end) - begin))
                start = min(stop, end)
            number += 1
        return found


def permutation(length: int, seed: int, *place: int) -> np.ndarray:
    """A permutation of range(length) that depends on (seed, place) alone, and is another for each of them."""
    sequence = np.random.SeedSequence(seed, spawn_key=place)
    return np.random.Generator(np.random.PCG64(sequence)).permutation(length)
