"""Selection over ranks, in real processes that hold parts of one matrix, against a stable sort of the whole."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from pool import pool_of
from test_batch_topk import CASES, L, sorted_places

from train.batch_topk import TopScores

NUM_TOKENS = 30
# Who holds what, unevenly: tokens from one on, tokens dealt in turn, tokens in any order, latents from one on, and
# latents with the dealt tokens of all ranks in the order of ranks.
SPLITS = ("tokens", "dealt", "shuffled", "latents", "gathered")


def wanted(name):
    return {"ties everywhere": 211, "all equal": 95, "one huge row": 37, "one positive": 5}.get(name, 130)


class Part(NamedTuple):
    """Numbers of a rank's rows and columns in the whole matrix, and whether `TopScores` is told them when made."""

    token_B: torch.Tensor
    latents: range
    told: bool


def part_of(split, rank, num_ranks):
    """The first rank of an uneven split has a single token, or latent."""
    size = L if split in ("latents", "gathered") else NUM_TOKENS
    edges = [0, 1, *(1 + (size - 1) * n // (num_ranks - 1) for n in range(1, num_ranks - 1)), size]
    own, in_order = range(edges[rank], edges[rank + 1]), torch.arange(NUM_TOKENS)
    shuffled = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(5))
    return {
        "tokens": Part(in_order[own.start : own.stop], range(L), False),
        "dealt": Part(in_order[rank::num_ranks], range(L), True),
        "shuffled": Part(shuffled[own.start : own.stop], range(L), True),
        "latents": Part(in_order, own, False),
        "gathered": Part(torch.cat([in_order[r::num_ranks] for r in range(num_ranks)]), own, True),
    }[split]


def halves(number):
    return (0, number // 2), (number // 2, number)


def chosen_here(everyone, pre_BL, scale_L, num_selected, part, fixed_size):
    """Places in the whole matrix that this rank holds of the selection, and how often ranks were summed."""
    num_sums = 0

    def all_reduce(counts):
        nonlocal num_sums
        num_sums += 1
        everyone.sum(counts, "histogram")

    numbers = {"token_B": part.token_B, "first_latent": part.latents.start} if part.told else {}
    row, column = (0, 0) if part.told else (int(part.token_B[0]), part.latents.start)
    top = TopScores(num_selected, NUM_TOKENS, L, torch.device("cpu"), all_reduce, fixed_size, **numbers)
    pre_BC, scale_C = pre_BL[part.token_B][:, part.latents], scale_L[part.latents]
    for first, end in halves(len(part.latents)):
        for top_row, bottom_row in halves(len(part.token_B)):
            piece = pre_BC[top_row:bottom_row, first:end].clone()
            top.add(piece, scale_C[first:end], column + first, row + top_row)
            piece.fill_(6e4)
    (token_S, latent_S), code_S, score_S, _ = top.finish()
    assert not ((token_S * L + latent_S).diff() < 0).any()
    positive = score_S > 0
    if part.told:
        assert ((token_S >= 0) & (token_S < len(part.token_B))).all()
    else:
        token_S = token_S[positive] - row
    latent_S = latent_S - column
    assert ((latent_S >= 0) & (latent_S < len(part.latents))).all()
    token_S, latent_S = token_S[: positive.sum()], latent_S[: positive.sum()]
    assert positive[: len(token_S)].all()
    assert torch.equal(code_S[: len(token_S)], pre_BC[token_S, latent_S].to(code_S.dtype))
    places = list(zip(part.token_B[token_S].tolist(), (latent_S + part.latents.start).tolist(), strict=True))
    return places, num_sums


def chosen_in_all_cases(world):
    """What a process chose of its own part, by case."""
    rank, num_ranks = world.everyone.rank, world.everyone.size
    found = {}
    for name, (pre_BL, scale_L) in CASES.items():
        for split in SPLITS:
            for fixed_size in (False, True):
                part = part_of(split, rank, num_ranks)
                found[name, split, fixed_size] = chosen_here(
                    world.everyone, pre_BL, scale_L, wanted(name), part, fixed_size
                )
    return found


def refused(world):
    """Whether a process raises when another one, the last, holds a nan."""
    pre_BL = torch.rand(NUM_TOKENS, L)
    pre_BL[-1, -1] = torch.nan
    part = part_of("tokens", world.everyone.rank, world.everyone.size)
    try:
        chosen_here(world.everyone, pre_BL, torch.ones(L), 9, part, False)
    except FloatingPointError:
        return True
    return False


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    """What each of 2 and 4 processes chose, by case."""
    return pool_of(request.param).run(chosen_in_all_cases)


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_choose_what_one_would(ranks, name, split, fixed_size):
    pre_BL, scale_L = CASES[name]
    found = [rank[name, split, fixed_size] for rank in ranks]
    for rank, (chosen, _) in enumerate(found):
        part = part_of(split, rank, len(ranks))
        assert all(t in part.token_B and j in part.latents for t, j in chosen)
    together = sorted(tuple(place) for chosen, _ in found for place in chosen)
    assert together == sorted_places(pre_BL * scale_L, wanted(name))
    assert len({num_sums for _, num_sums in found}) == 1


def test_winners_are_uneven(ranks):
    """The cases above hold what they should: one rank with all winners, others with none."""
    found = [len(rank["one huge row", "tokens", False][0]) for rank in ranks]
    assert sorted(found)[-1] == 37 and sum(found) == 37


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_refuse_what_one_holds(num_ranks):
    assert all(pool_of(num_ranks).run(refused))
