"""The largest scores of each row over ranks that hold different numbers of columns, against a sort of each row."""

from __future__ import annotations

import pytest
import torch
from pool import pool_of

from train.ranks import Group
from train.row_cut import row_cut

B, Z = 9, 24


def cases():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(B, Z, generator=generator)
    return {
        "normal": normal,
        "positive": normal.exp(),
        "ties": (normal * 2).round(),
        "all equal": torch.full((B, Z), 0.7),
        "few positive": torch.where(torch.arange(Z) % 11 == 3, normal.abs(), -1.0),
        "none positive": -normal.abs(),
        "zeros": torch.zeros(B, Z),
        "any size": (normal * 25).exp(),
        "the smallest and the largest": torch.where(normal > 0, 2.0**-149, torch.finfo(torch.float32).max),
        "fp64, apart by less than fp32 tells": 1 + normal.double() * 1e-12,
        "bf16": normal.bfloat16(),
    }


CASES = cases()
# Where the columns of ranks begin and end, by the number of ranks: even, and with ranks that have none.
EDGES = {1: [[0, Z]], 2: [[0, 12, Z], [0, 0, Z], [0, Z, Z]], 4: [[0, 6, 12, 18, Z], [0, 0, 1, 1, Z]]}
CHOSEN = (0, 1, 5, 12, Z, 100)


def expected(score_BZ, num_chosen):
    """The slow form: a stable descending sort of each row, cut, without what is not positive."""
    mask_BZ = torch.zeros_like(score_BZ, dtype=torch.bool)
    for row_Z, mask_Z in zip(score_BZ, mask_BZ, strict=True):
        mask_Z[row_Z.sort(descending=True, stable=True).indices[:num_chosen]] = True
    return mask_BZ & (score_BZ > 0)


def chosen_here(world):
    """Masks of this rank's columns, in all cases."""
    found = {}
    for name, score_BZ in CASES.items():
        for split, edges in enumerate(EDGES[world.everyone.size]):
            own_BZ = score_BZ[:, edges[world.everyone.rank] : edges[world.everyone.rank + 1]]
            for num_chosen in CHOSEN:
                found[name, split, num_chosen] = row_cut(own_BZ, num_chosen, world.everyone)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return pool_of(request.param).run(chosen_here)


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_choose_what_a_sort_of_each_row_does(ranks, name):
    for split in range(len(EDGES[len(ranks)])):
        for num_chosen in CHOSEN:
            together = torch.cat([rank[name, split, num_chosen] for rank in ranks], dim=1)
            assert torch.equal(together, expected(CASES[name], num_chosen))


@pytest.mark.parametrize("name", ["normal", "positive", "few positive", "none positive", "any size"])
def test_one_rank_chooses_the_same_where_nothing_is_tied(name):
    for num_chosen in CHOSEN:
        assert torch.equal(row_cut(CASES[name], num_chosen, Group()), expected(CASES[name], num_chosen))


def test_one_rank_chooses_as_many_of_tied_scores():
    for num_chosen in CHOSEN:
        chosen = row_cut(CASES["all equal"], num_chosen, Group())
        assert chosen.sum(1).tolist() == [min(num_chosen, Z)] * B


def test_no_columns_at_all():
    assert row_cut(torch.zeros(B, 0), 5, Group()).shape == (B, 0)


def bytes_sent(world):
    """Bytes that this rank hands to collectives for a row, of scores that are many and of few."""
    sent = 0

    class Counting(Group):
        def sum(self, values, what):
            nonlocal sent
            sent += values.nbytes
            return super().sum(values, what)

        def gather(self, part, what):
            nonlocal sent
            sent += part.nbytes
            return super().gather(part, what)

    everyone = world.everyone
    counting = Counting(everyone.rank, everyone.size, everyone.process_group)
    for num_columns in (3, 3000):
        row_cut(torch.rand(5, num_columns), 1500, counting)
    return sent / 10


def test_what_is_sent_depends_on_the_number_of_tokens_alone():
    """Seven sums of 15 counts and one of 7, the last three bits of 31, and two numbers."""
    assert pool_of(2).run(bytes_sent) == [(7 * 15 + 7 + 2) * 4] * 2
