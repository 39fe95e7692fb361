"""How much memory the shards take that are held while lanes read from them, worked out before any is computed.

A lane needs a shard from the step at which it reaches the window before the shard's first token until it has left the
window of its last: the current and the next window of every lane are held. What is held is a pure function of the order
of tokens (`train.lanes`), so the peak of a whole run is arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.lanes import Lanes, ShardOrder

# Where Linux states the memory limit of a container, by the version of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Hold:
    """A shard is held in steps [first, stop)."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class Peak:
    """What is held in the step in which that is the most tokens."""

    shards: int
    tokens: int


def holds(lanes: Lanes, seed: int, kept_of_shards: np.ndarray, batch: int, num_steps: int) -> Iterator[Hold]:
    """Every time that a lane of the rank needs a shard, over the steps of a run of `batch` tokens each;
    `kept_of_shards` (shards,) counts kept training tokens.
    """
    ahead = max(batch, 2 * lanes.num_lanes)  # entries that a step looks at, as in train.stream
    last_epoch = (num_steps * batch - 1) // lanes.num_tokens
    for epoch in range(last_epoch + 1):
        order = ShardOrder(seed, epoch, kept_of_shards)
        for lane in lanes.own(epoch):
            place = 0
            for span in order.spans(lanes.start(lane), lanes.start(lane) + lanes.size(lane)):
                last = place + span.stop - span.first - 1
                first_step = max(0, (_reaches_window_before(lanes, epoch, lane, place) - ahead) // batch + 1)
                last_step = lanes.entry(epoch, lane, lanes.window(epoch, lane, last).stop - 1) // batch
                if lanes.entry(epoch, lane, lanes.window(epoch, lane, place).first) < num_steps * batch:
                    yield Hold(span.shard, first_step, min(last_step + 1, num_steps))
                place = last + 1


def peak(held: Iterator[Hold], tokens_of_shards: np.ndarray) -> Peak:
    """The largest sum over the shards that are held at a time, each counted once, and their number;
    `tokens_of_shards` (shards,) counts all tokens.
    """
    changes: dict[int, list[int]] = {}
    for hold in _merged(held):
        for step, sign in ((hold.first, 1), (hold.stop, -1)):
            change = changes.setdefault(step, [0, 0])
            change[0] += sign
            change[1] += sign * int(tokens_of_shards[hold.shard])
    totals = np.cumsum([changes[step] for step in sorted(changes)], axis=0)
    tokens, shards = max((tokens, shards) for shards, tokens in totals.tolist())
    return Peak(shards, tokens)


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or the limit of its container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stated = [path.read_text().strip() for path in LIMITS if path.exists()]
    return min([physical, *(int(limit) for limit in stated if limit.isdigit())])


def _merged(held: Iterator[Hold]) -> Iterator[Hold]:
    """The same steps, none of them twice for one shard."""
    current: Hold | None = None
    for hold in sorted(held, key=lambda hold: (hold.shard, hold.first)):
        if current and current.shard == hold.shard and hold.first <= current.stop:
            current = Hold(hold.shard, current.first, max(current.stop, hold.stop))
            continue
        if current:
            yield current
        current = hold
    if current:
        yield current


def _reaches_window_before(lanes: Lanes, epoch: int, lane: int, place: int) -> int:
    """The entry at which a lane begins the window before the one that holds `place`; 0 before the first of the run."""
    before = lanes.window_before(lanes.window(epoch, lane, place))
    return lanes.entry(before.epoch, before.lane, before.first) if before else 0
