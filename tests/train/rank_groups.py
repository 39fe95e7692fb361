"""Functions on the first ranks of a pool: any number of ranks up to four without a pool for each."""

from __future__ import annotations

import itertools
import json
import uuid

from pool import pool_of

from train.ranks import Group

MOST = 4


def on_ranks(num_ranks, function, *arguments, timeout=60.0):
    """[function(world, *arguments) of rank 0, ..., of rank num_ranks - 1]."""
    name = uuid.uuid4().hex
    return pool_of(MOST).run(on_the_first, num_ranks, name, function, *arguments, timeout=timeout)[:num_ranks]


def on_the_first(world, num_ranks, name, function, *arguments):
    if world.everyone.rank < num_ranks:
        return function(FirstRanks(world, num_ranks, name), *arguments)
    return None


class FirstRanks:
    """The first ranks of a world, as far as checkpoints need one: what they say to each other only they hear."""

    def __init__(self, world, num_ranks, name):
        self.everyone = Group(world.everyone.rank, num_ranks)
        self.is_main, self.device = world.is_main, world.device
        self.doing = world.doing
        self._world, self._name, self._calls = world, name, itertools.count()

    def tell(self, key, value):
        self._world.tell(f"{self._name}/{key}", value)

    def told(self, key):
        return self._world.told(f"{self._name}/{key}")

    def from_main(self, value):
        key = f"from_main/{next(self._calls)}"
        if self.is_main:
            self.tell(key, json.dumps(value))
        return json.loads(self.told(key))
