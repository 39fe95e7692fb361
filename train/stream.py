"""The training batches of a run: batch t is a pure function of the data, the seed, num_tokens_per_step and t.

Batch t holds entries [t*B, (t+1)*B) of the order in `train.lanes`, as ascending rows: a batch is a set, and ascending
rows are read fastest. So the position of a run is one integer. Of W ranks each reads b = B / W of these tokens, and
knows their numbers in the whole batch. Shapes: B tokens, b of a rank, M models, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from train.config import DataConfig
from train.data import TrainingData, gather
from train.lanes import Lanes, ShardOrder, Span, Stretch, permutation


class BatchStream:
    """Batches and where they lie, as rank `rank` of `num_ranks` reads them; `num_tokens_per_step` is of all ranks and,
    as data.num_lanes, a multiple of their number. What is kept from call to call is for speed alone.
    """

    def __init__(
        self,
        data: TrainingData,
        seed: int,
        num_tokens_per_step: int,
        config: DataConfig,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.data, self.num_ranks = data, num_ranks
        self.num_tokens_per_step, self.num_own_tokens = num_tokens_per_step, num_tokens_per_step // num_ranks
        first_documents = [documents.start for documents in data.tokens.shard_documents()]
        self._tokens_of_shards = np.add.reduceat(data.train_tokens, first_documents)
        self.num_lanes, self.shuffle_window = config.num_lanes, config.shuffle_window
        num_tokens = int(data.train_tokens.sum())
        self._lanes = Lanes(num_tokens, config.num_lanes, config.shuffle_window, rank, num_ranks)
        self._all_lanes = Lanes(num_tokens, config.num_lanes, config.shuffle_window)
        self._seed = seed
        self._orders: dict[int, ShardOrder] = {}  # by epoch
        self._rows: dict[int, tuple[Stretch, np.ndarray]] = {}  # by lane: its window, and the window's rows in order
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None  # a step, its rows and numbers
        self._reached: list[Stretch] = []
        self._windows: list[Stretch] = []

    @property
    def steps_per_epoch(self) -> int:
        """Whole ones."""
        return self._lanes.num_tokens // self.num_tokens_per_step

    def batch(self, step: int) -> Tensor:
        """This rank's raw activations (b, M, D) of step `step`, counted from 0, decoded, in memory of their own."""
        return gather(self.data, self.rows(step))

    def rows(self, step: int) -> np.ndarray:
        """This rank's rows (b,) of step `step`, ascending."""
        return self._plan(step)[0]

    def numbers(self, step: int) -> np.ndarray:
        """Which of the ascending rows of the whole batch this rank's are, (b,) int64, ascending."""
        return self._plan(step)[1]

    def windows(self, step: int, stop: int) -> list[Stretch]:
        """The windows that lanes of this rank read in step `step`, or soon after it, then the next window of each lane;
        none that begins in step `stop` or after it, where the run ends.
        """
        num_entries = max(self.num_tokens_per_step, 2 * self.num_lanes)  # every lane, at an epoch's end as well
        reached = [window for _, window in self._pieces(self._lanes, step, num_entries)]
        if reached != self._reached:
            last = {window.lane: window for window in reached}
            following = (window for window in map(self._lanes.next_window, last.values()) if len(window))
            self._reached, self._windows = reached, list(dict.fromkeys([*reached, *following]))
        end = stop * self.num_tokens_per_step
        return [each for each in self._windows if self._lanes.entry(each.epoch, each.lane, each.first) < end]

    def spans(self, window: Stretch) -> list[Span]:
        """The parts of shards that a window of a lane lies in."""
        start = self._lanes.start(window.lane)
        return self._order(window.epoch).spans(start + window.first, start + window.stop)

    def describe(self, step: int) -> str:
        """Where step `step` lies, for messages."""
        first, stop = self.entries(step)
        return f"tokens {first} to {stop} of the run, epoch {self.epoch(step)}"

    def entries(self, step: int) -> tuple[int, int]:
        """The entries [first, stop) of the run that step `step` holds, of all ranks."""
        return step * self.num_tokens_per_step, (step + 1) * self.num_tokens_per_step

    def epoch(self, step: int) -> int:
        """In which epoch step `step` begins."""
        return self.entries(step)[0] // self._lanes.num_tokens

    def plan(self, step: int) -> np.ndarray:
        """The rows (B,) of all ranks in step `step`, ascending."""
        return np.sort(np.concatenate([rows for _, rows in self._parts(step)]))

    def _plan(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows and their numbers."""
        if self._planned is None or self._planned[0] != step:
            ranks, rows = zip(*self._parts(step), strict=True)
            rank_B, row_B = np.repeat(ranks, list(map(len, rows))), np.concatenate(rows)
            order_B = np.argsort(row_B, kind="stable")
            number_b = np.flatnonzero(rank_B[order_B] == self._lanes.rank)
            self._planned = step, row_B[order_B[number_b]], number_b
        return self._planned[1:]

    def _parts(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """What a step takes of each window of all lanes: the rank that reads it, and the rows."""
        for piece, window in self._pieces(self._all_lanes, step, self.num_tokens_per_step):
            rows = self._rows_of(window)[piece.first - window.first : piece.stop - window.first]
            yield self._lanes.rank_of(piece.epoch, piece.lane), rows

    def _pieces(self, lanes: Lanes, step: int, num_entries: int) -> Iterator[tuple[Stretch, Stretch]]:
        """What `num_entries` entries from the beginning of a step take of each window, and the window."""
        start = step * self.num_tokens_per_step
        for stretch in lanes.stretches(start, start + num_entries):
            place = stretch.first
            while place < stretch.stop:
                window = lanes.window(stretch.epoch, stretch.lane, place)
                end = min(stretch.stop, window.stop)
                yield Stretch(stretch.epoch, stretch.lane, place, end), window
                place = end

    def _rows_of(self, window: Stretch) -> np.ndarray:
        """The rows of a window, in the order in which its lane gives them."""
        found = self._rows.get(window.lane)
        if found is None or found[0] != window:
            spans = self.spans(window)
            rows = np.concatenate([self.data.train_rows(span.shard)[span.first : span.stop] for span in spans])
            order = permutation(len(rows), self._seed, window.epoch, window.lane, window.first)
            self._rows[window.lane] = found = window, rows[order]
        return found[1]

    def _order(self, epoch: int) -> ShardOrder:
        if epoch not in self._orders:
            near = {other: order for other, order in self._orders.items() if abs(other - epoch) == 1}
            self._orders = {**near, epoch: ShardOrder(self._seed, epoch, self._tokens_of_shards)}
        return self._orders[epoch]
