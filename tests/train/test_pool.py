"""The pools of processes that the tests of several ranks run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
from pool import pool_of


def summed(world, factor):
    total = world.everyone.sum(torch.tensor([world.everyone.rank + 1.0]) * factor, "the test's sum")
    return os.getpid(), total.item(), torch.get_num_threads()


def in_halves(world):
    within, across = world.split(2)
    ranks = [
        group.gather(torch.tensor([world.everyone.rank]), "the test's ranks").tolist() for group in (within, across)
    ]
    return ranks, (within.rank, across.rank)


def one_fails(world):
    if world.everyone.rank == 1:
        raise KeyError("lost")
    world.everyone.sum(torch.ones(1), "a sum that never comes")


def one_ends(world):
    if world.everyone.rank == 1:
        os._exit(3)
    world.everyone.sum(torch.ones(1), "a sum that never comes")


def one_sleeps(world):
    if world.everyone.rank == 1:
        time.sleep(60)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_same_processes_serve_every_call(num_ranks):
    first, second = (pool_of(num_ranks).run(summed, factor) for factor in (1.0, 10.0))
    pids = {pid for pid, *_ in first}
    assert len(pids) == num_ranks and os.getpid() not in pids
    assert pids == {pid for pid, *_ in second}
    total = num_ranks * (num_ranks + 1) / 2
    assert [values for _, *values in first] == [[total, 1]] * num_ranks
    assert [values for _, *values in second] == [[10 * total, 1]] * num_ranks


def test_groups_within_and_across():
    found = pool_of(4).run(in_halves)
    assert [ranks for ranks, _ in found] == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]
    assert [numbers for _, numbers in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_an_error_of_a_rank_is_raised_with_its_traceback():
    with pytest.raises(KeyError, match="lost") as caught:
        pool_of(2).run(one_fails)
    notes = "".join(caught.value.__notes__)
    assert "Rank 1 of test_pool.one_fails on 2 ranks" in notes and 'raise KeyError("lost")' in notes
    assert pool_of(2).run(summed, 1.0)[0][1] == 3


def test_a_process_that_ends_is_an_error():
    with pytest.raises(RuntimeError, match="exit code 3"):
        pool_of(2).run(one_ends)
    assert pool_of(2).run(summed, 1.0)[0][1] == 3


def test_a_call_that_takes_too_long_is_ended_and_shows_where_it_was():
    with pytest.raises(
        TimeoutError, match=r"test_pool.one_sleeps on 2 ranks did not end within 2 s on ranks \[1\]"
    ) as caught:
        pool_of(2).run(one_sleeps, timeout=2.0)
    assert "in one_sleeps" in str(caught.value)
    assert pool_of(2).run(summed, 1.0)[0][1] == 3
