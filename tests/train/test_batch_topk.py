"""Exact selection against a stable sort of everything, in all forms that run without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train import candidates
from train.batch_topk import TopScores, select

L = 40


def sorted_places(score_BL, num_selected):
    """The slow form: rank every entry by (score descending, token, latent), cut, drop what is not positive, sort by
    place.
    """
    order = score_BL.flatten().sort(descending=True, stable=True).indices[:num_selected]
    order = order[score_BL.flatten()[order] > 0].sort().values
    return [divmod(place, score_BL.shape[1]) for place in order.tolist()]


def places(selection):
    return list(zip(selection.token.tolist(), selection.latent.tolist(), strict=True))


def streamed(pre_BL, scale_L, num_selected, chunk, fixed_size=False, latents_descend=False):
    """What `TopScores` chooses from chunks of latents, each overwritten once it was added."""
    top = TopScores(num_selected, *pre_BL.shape, pre_BL.device, fixed_size=fixed_size)
    starts = list(range(0, pre_BL.shape[1], chunk))
    for first in reversed(starts) if latents_descend else starts:
        buffer = pre_BL[:, first : first + chunk].clone()
        top.add(buffer, scale_L[first : first + chunk], first)
        buffer.fill_(6e4)
    return top.finish()


def check(selected, pre_BL, scale_L, num_selected, fixed_size=False):
    """Places, codes and scores of all chosen entries, and of the free slots behind them."""
    score_BL = pre_BL * scale_L
    expected = sorted_places(score_BL, num_selected)
    free = (num_selected - len(expected)) * fixed_size
    last_place = (len(pre_BL) - 1, pre_BL.shape[1] - 1)
    assert places(selected.selection) == expected + [last_place] * free
    token, latent = torch.tensor(expected, dtype=torch.int64).view(-1, 2).T
    zeros = torch.zeros(free, dtype=score_BL.dtype)
    assert torch.equal(selected.code_S, torch.cat([pre_BL[token, latent].to(score_BL.dtype), zeros]))
    assert torch.equal(selected.score_S, torch.cat([score_BL[token, latent], zeros]))
    assert selected.finite


def cases():
    """Codes and scales that a selection could get wrong."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(30, L, generator=generator)
    one, uneven = torch.ones(L), torch.rand(L, generator=generator) + 0.5
    smallest = 2.0**-149
    huge_row, huge_latent = normal.clone(), normal.clone()
    huge_row[17], huge_latent[:, 9] = 1e30, 1e30
    owned = uneven.clone()
    owned[::3] = 0.0
    return {
        "normal": (normal, uneven),
        "positive": (normal.abs(), uneven),
        "no scale": (normal, one),
        "ties everywhere": ((normal * 2).round(), one),
        "ties of unequal codes": (torch.exp2((normal * 2).round()), torch.exp2((uneven * 4).round())),
        "all equal": (torch.full((30, L), 0.3), one),
        "all the smallest": (torch.full((30, L), smallest), one),
        "all the largest": (torch.full((30, L), torch.finfo(torch.float32).max), one),
        "zeros": (torch.zeros(30, L), uneven),
        "negative zeros": (torch.zeros(30, L).neg(), uneven),
        "all negative": (-normal.abs() - 1, uneven),
        "one positive": (torch.where(torch.arange(30 * L).view(30, L) == 77, 1.0, -1.0), uneven),
        "denormals": ((normal * 9).round() * smallest, one),
        "denormal products": (normal * 1e-30, uneven * 1e-10),
        "a denormal cut": (torch.where(normal > 1.5, normal, (normal * 9).round() * smallest), uneven),
        "quotients beyond the largest": (normal.clamp(-3, 3) * 1e38, torch.where(uneven > 1, 1e-38, 1.0)),
        "any size": (torch.exp(normal * 20), torch.exp(normal[0])),
        "one huge row": (huge_row, uneven),
        "one huge latent": (huge_latent, uneven),
        "ascending": (torch.arange(1.0, 30 * L + 1).view(30, L), one),
        "descending": (torch.arange(30.0 * L, 0, -1).view(30, L), one),
        "latents without scale": (normal, owned),
        "bf16 codes": (normal.bfloat16(), uneven),
        "bf16 codes, equal": (torch.full((30, L), 0.3).bfloat16(), one),
        "bf16 denormals": (((normal * 9).round() * 2.0**-133).bfloat16(), one),
        "bf16": (normal.bfloat16(), one.bfloat16()),
        "fp16": (normal.half(), one.half()),
        "fp64": (normal.double(), uneven.double()),
        "fp64, apart by less than fp32 tells": (1 + normal.double() * 1e-12, one.double()),
    }


CASES = cases()


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_full_sort(monkeypatch, name, fixed_size):
    """In chunks of all sizes, searched in blocks far smaller than a chunk, with samples that tell little."""
    pre_BL, scale_L = CASES[name]
    monkeypatch.setattr(candidates, "BLOCK_SIZE", 64)
    monkeypatch.setattr(candidates, "SAMPLE_SIZE", 30)
    for num_selected in (0, 1, 7, 131, 30 * L, 5000):
        for chunk, latents_descend in ((1, True), (7, False), (16, True), (L, False)):
            selected = streamed(pre_BL, scale_L, num_selected, chunk, fixed_size, latents_descend)
            check(selected, pre_BL, scale_L, num_selected, fixed_size)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_and_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_latents, coarse = (int(n) for n in torch.randint(1, 60, (3,), generator=generator))
    pre_BL = (torch.randn(num_tokens, num_latents, generator=generator) * coarse).round() / coarse
    scale_L = torch.randint(0, 4, (num_latents,), generator=generator) / 2
    num_selected = int(torch.randint(0, num_tokens * num_latents + 5, (), generator=generator))
    chunk = int(torch.randint(1, num_latents + 1, (), generator=generator))
    for fixed_size in (False, True):
        selected = streamed(pre_BL, scale_L, num_selected, chunk, fixed_size)
        check(selected, pre_BL, scale_L, num_selected, fixed_size)
    assert places(select(pre_BL * scale_L, num_selected)) == sorted_places(pre_BL * scale_L, num_selected)


def test_ties_at_the_cut_go_to_the_first_token_then_the_first_latent():
    scores = torch.tensor([[1.0, 2.0, 2.0], [3.0, 2.0, 2.0]])
    assert places(select(scores, 3)) == [(0, 1), (0, 2), (1, 0)]


def test_a_tie_in_a_later_chunk_may_come_first():
    """Token 0 of the second chunk precedes token 1 of the first, though the first alone would fill the selection."""
    top = TopScores(2, 2, 4, torch.device("cpu"))
    for first in (0, 2):
        top.add(torch.ones(2, 2), torch.ones(2), first)
    assert places(top.finish().selection) == [(0, 0), (0, 1)]
    top = TopScores(3, 2, 4, torch.device("cpu"))
    for first in (0, 2):
        top.add(torch.ones(2, 2), torch.ones(2), first)
    assert places(top.finish().selection) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_matrices_of_no_or_one_entry(shape):
    assert places(select(torch.ones(shape), 3)) == [(0, 0)] * math.prod(shape)
    assert places(select(torch.ones(shape), 0)) == []


@pytest.mark.parametrize(("units", "expected"), [(2.6, (0, 3)), (2.4, (1, 0))])
def test_a_product_that_is_rounded_up_to_the_bound(units, expected):
    """Near the smallest float u the error of a product is large, relative to it: 2.6 u are 3 u, and an earlier token in
    a later chunk ties with the bound of 3 u that three others have set.
    """
    u = 2.0**-149
    top = TopScores(1, 2, 4, torch.device("cpu"))
    top.add(torch.tensor([[0.0, 0.0, 0.0], [3 * u, u, u]]), torch.ones(3), 0)
    top.add(torch.tensor([[units * u * 2**30], [0.0]]), torch.tensor([2.0**-30]), 3)
    assert places(top.finish().selection) == [expected]


@pytest.mark.parametrize("stride", [31, 7, 3, 1])
def test_a_misleading_sample_does_not_change_the_result(monkeypatch, stride):
    """Large scores in few columns, or just where samples look: the first bound is far too low or too high."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(candidates, "SAMPLE_SIZE", 3000 // stride)
    for offset in (slice(0, 1), slice(3, 9), slice(None)):
        scores = torch.rand(60, 50, generator=generator)
        scores[:, offset] += 10
        scores.flatten()[::stride] += 50
        for num_selected in (5, 200, 700, 2999):
            assert places(select(scores, num_selected)) == sorted_places(scores, num_selected)


def test_a_first_bound_that_is_too_high_is_lowered_before_all_scores_are_taken(monkeypatch):
    """Every 31st of a million scores is looked at, and 150 of these stand out: above the bound that they suggest are
    too few, above that of four times as many about 13,000.
    """
    scores, taken, entries = (
        torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)),
        [],
        candidates.Chunk.entries,
    )
    scores.flatten()[::31][:150] += 50
    monkeypatch.setattr(candidates.Chunk, "entries", lambda *chunk: taken.append(len(chunk[1])) or entries(*chunk))
    assert places(select(scores, 2000)) == sorted_places(scores, 2000)
    assert max(taken) < candidates.BLOCK_SIZE / 4


def test_chunks_may_have_gaps_in_memory():
    pre_BL = torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
    top = TopScores(50, 20, 30, torch.device("cpu"))
    top.add(pre_BL[:, ::3], torch.ones(30))
    assert places(top.finish().selection) == sorted_places(pre_BL[:, ::3], 50)


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["code", "scale"])
def test_scores_that_are_not_finite_are_refused(bad, where, fixed_size):
    pre_BL, scale_L = torch.rand(4, 6), torch.rand(6)
    (pre_BL[2] if where == "code" else scale_L)[3] = bad
    if fixed_size:
        assert not streamed(pre_BL, scale_L, 3, 2, fixed_size).finite
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            streamed(pre_BL, scale_L, 3, 2)


@pytest.mark.parametrize("fixed_size", [False, True])
def test_a_product_that_overflows_is_refused(fixed_size):
    pre_BL = torch.rand(4, 6)
    pre_BL[2, 3] = 3e38
    if fixed_size:
        assert not streamed(pre_BL, torch.full((6,), 2.0), 3, 2, fixed_size).finite
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            streamed(pre_BL, torch.full((6,), 2.0), 3, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_select_refuses_scores_that_are_not_finite(bad):
    scores = torch.rand(4, 5)
    scores[2, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        select(scores, 3)


def test_finite_scores_with_an_infinite_sum_are_accepted():
    assert len(select(torch.full((4, 5), 3e38), 6).token) == 6


def test_candidates_stay_few_whatever_comes(monkeypatch):
    """Of scores that rise from block to block each is a candidate when it comes; memory must not grow with them."""
    monkeypatch.setattr(candidates, "BLOCK_SIZE", 256)
    most = 0
    join = candidates.Entries.join

    def counted(parts):
        nonlocal most
        most = max(most, sum(len(part.score) for part in parts))
        return join(parts)

    monkeypatch.setattr(candidates.Entries, "join", counted)
    for scores in (torch.arange(1.0, 64_001).view(1000, 64), torch.ones(1000, 64)):
        assert places(select(scores, 300)) == sorted_places(scores, 300)
    assert 300 < most <= 2 * 300 + 256


def test_positions_beyond_32_bits():
    """Two pieces of a matrix of 2^50 entries: at equal scores the earlier token wins."""
    num_tokens, num_latents = 1 << 33, 1 << 17
    for fixed_size in (False, True):
        top = TopScores(3, num_tokens, num_latents, torch.device("cpu"), fixed_size=fixed_size)
        top.add(torch.ones(1, 2), torch.ones(2), num_latents - 2, num_tokens - 1)
        top.add(torch.tensor([[1.0, 2.0]]), torch.ones(2), 70_000, 1 << 32)
        assert places(top.finish().selection) == [
            (1 << 32, 70_000),
            (1 << 32, 70_001),
            (num_tokens - 1, num_latents - 2),
        ]


def test_more_than_2_to_the_31_scores():
    """Every row is the same row, so the matrix needs no memory; its best latent is chosen for all tokens, the next best
    for the first 999 only.
    """
    row_L = torch.full((1, 1 << 16), -1.0)
    row_L[0, 41_234], row_L[0, 999] = 5.0, 4.0
    scores = row_L.expand((1 << 15) + 1, -1)
    assert scores.numel() > 2**31
    selection = select(scores, len(scores) + 999)
    assert torch.equal(selection.token[selection.latent == 41_234], torch.arange(len(scores)))
    assert torch.equal(selection.token[selection.latent == 999], torch.arange(999))


@pytest.mark.parametrize("fixed_size", [False, True])
def test_numbers_of_tokens_break_ties(fixed_size):
    """Rows 0, 1, 2 are tokens 5, 0, 3 of 7: of equal scores row 1 comes first, then row 2."""
    numbers = {"token_B": torch.tensor([5, 0, 3]), "fixed_size": fixed_size}
    first_five = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    for num_selected, expected in ((1, [(1, 0)]), (3, [(1, 0), (1, 1), (2, 0)]), (5, first_five)):
        top = TopScores(num_selected, 7, 2, torch.device("cpu"), **numbers)
        top.add(torch.ones(3, 2), torch.ones(2))
        assert places(top.finish().selection) == expected


def test_free_slots_lie_where_the_rank_has_rows_and_columns():
    """Columns 4 and 5 of 9, and 3 of 50 tokens; one score is positive, two slots stay free."""
    token_B = torch.tensor([40, 2, 9])
    top = TopScores(3, 50, 9, torch.device("cpu"), fixed_size=True, token_B=token_B, first_latent=4)
    top.add(torch.tensor([[-1.0, -1.0], [-1.0, 3.0], [0.0, -1.0]]), torch.ones(2))
    selected = top.finish()
    assert places(selected.selection) == [(1, 1), (2, 1), (2, 1)]
    assert selected.score_S.tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("fixed_size", [False, True])
def test_a_rank_without_tokens(fixed_size):
    none = torch.zeros(0, dtype=torch.int64)
    top = TopScores(3, 50, 9, torch.device("cpu"), fixed_size=fixed_size, token_B=none)
    top.add(torch.ones(0, 9), torch.ones(9))
    assert not top.finish().score_S.count_nonzero()


@pytest.mark.parametrize("token_B", [None, torch.arange(8)])
def test_with_fixed_sizes_nothing_waits_for_a_value(token_B):
    """Fake tensors have no values: whatever asks for one, or for a size that depends on one, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        top = TopScores(9, 8, 20, torch.device("cpu"), lambda counts: counts, True, token_B)
        for first in (0, 10):
            top.add(torch.empty(8, 10), torch.empty(10), first)
        selected = top.finish()
    assert selected.score_S.shape == selected.selection.token.shape == (9,) and selected.finite.shape == ()


@pytest.mark.parametrize("waits", [torch.nonzero, torch.bincount, torch.Tensor.item, bool])
def test_the_check_above_sees_what_waits(waits):
    with FakeTensorMode(), pytest.raises(Exception, match=r"aten\."):
        waits(torch.ones(1, dtype=torch.int64))
