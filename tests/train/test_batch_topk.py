"""Exact selection: against a stable sort of everything."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train import batch_topk
from train.batch_topk import select


def sorted_selection(scores_BL, num_selected):
    """The slow form: rank every entry by (score descending, token, latent), cut, drop what is not positive, sort by
    place.
    """
    places = [(-value, t, j) for t, row in enumerate(scores_BL.tolist()) for j, value in enumerate(row) if value > 0]
    return sorted((t, j) for _, t, j in sorted(places)[:num_selected])


def places(selection):
    return list(zip(selection.token.tolist(), selection.latent.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_equals_a_full_sort_ties_included(seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_latents = (int(n) for n in torch.randint(1, 40, (2,), generator=generator))
    scores = torch.randn(num_tokens, num_latents, generator=generator)
    if seed % 3 == 0:
        scores = (scores * 2).round()  # many ties, at the cut too
    if seed % 3 == 1:
        scores = scores.relu()
    for num_selected in (0, 1, 7, num_tokens * num_latents // 3, num_tokens * num_latents, 10_000):
        assert places(select(scores, num_selected)) == sorted_selection(scores, num_selected)


def test_ties_at_the_cut_go_to_the_first_token_then_the_first_latent():
    scores = torch.tensor([[1.0, 2.0, 2.0], [3.0, 2.0, 2.0]])
    assert places(select(scores, 3)) == [(0, 1), (0, 2), (1, 0)]


def test_nothing_positive_selects_nothing():
    assert places(select(torch.tensor([[0.0, -1.0]]), 2)) == []


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_blocks_of_any_size_give_the_same(monkeypatch, block):
    scores = (torch.randn(13, 17, generator=torch.Generator().manual_seed(0)) * 3).round()
    monkeypatch.setattr(batch_topk, "MAX_ELEMENTS", block)
    for num_selected in (1, 3, 30):
        assert places(select(scores, num_selected)) == sorted_selection(scores, num_selected)


class LargestInput(TorchDispatchMode):
    """Records the largest tensor that operators with a limit of 2^31 elements are given."""

    def __init__(self):
        super().__init__()
        self.largest = {torch.ops.aten.topk.default: 0, torch.ops.aten.nonzero.default: 0}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in self.largest:
            self.largest[operator] = max(self.largest[operator], args[0].numel())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("scores", [torch.randn(50, 60), torch.ones(50, 60)])
def test_no_operator_gets_more_elements_than_it_can_count(monkeypatch, scores):
    """With equal scores all 3000 are candidates."""
    monkeypatch.setattr(batch_topk, "MAX_ELEMENTS", 256)
    monkeypatch.setattr(batch_topk, "SAMPLE_SIZE", 200)
    with LargestInput() as seen:
        selection = select(scores, 20)
    assert places(selection) == sorted_selection(scores, 20)
    assert all(0 < largest <= 256 for largest in seen.largest.values())


@pytest.mark.parametrize("sample_size", [1, 10, 100, 5000])
def test_the_sample_does_not_change_the_result(monkeypatch, sample_size):
    """Large scores in few columns, or just where samples look: the bound starts far too low or too high."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(batch_topk, "SAMPLE_SIZE", sample_size)
    for offset in (slice(0, 1), slice(3, 9), slice(None)):
        scores = torch.rand(60, 50, generator=generator)
        scores[:, offset] += 10
        scores.flatten()[:: max(1, scores.numel() // sample_size)] += 5
        for num_selected in (5, 200, 2999):
            assert places(select(scores, num_selected)) == sorted_selection(scores, num_selected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.rand(4, 5)
    scores[2, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        select(scores, 3)


def test_finite_scores_with_an_infinite_sum_are_accepted():
    scores = torch.full((4, 5), 3e38)
    assert len(select(scores, 6).token) == 6


def test_four_million_scores_are_cut_where_a_full_order_cuts_them():
    scores = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)).relu()
    selection = select(scores, 24 * 1024)
    assert len(selection.token) == 24 * 1024
    assert scores[selection].min() == scores.flatten().kthvalue(scores.numel() - 24 * 1024 + 1).values
