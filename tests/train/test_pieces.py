"""A state in pieces is the whole state, and anything else is an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from planted_states import TENSORS, assert_holds, planted, state_of

from train.pieces import Extent, Piece, SavedState, TrainingState, covering


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_ranks_pieces_make_the_whole_in_any_order(num_ranks):
    states = [state_of(rank, num_ranks, 7) for rank in range(num_ranks)]
    assert_holds(SavedState.of(states), 7)
    assert_holds(SavedState.of(reversed(states)), 7)


def test_every_range_of_rows_can_be_read():
    saved = SavedState.of([state_of(rank, 3, 7) for rank in range(3)])
    for name in TENSORS:
        whole = planted(name, 7)
        assert saved.num_rows(name) == len(whole)
        for first, stop in itertools.combinations_with_replacement(range(len(whole) + 1), 2):
            rows = saved.rows(name, first, stop)
            assert rows.dtype == whole.dtype and rows.shape == whole[first:stop].shape
            assert torch.equal(rows, whole[first:stop])


@pytest.mark.parametrize(("first", "stop"), [(-1, 2), (3, 2), (0, 12)])
def test_rows_that_a_tensor_does_not_have_are_an_error(first, stop):
    with pytest.raises(IndexError, match="of weights, which has 11"):
        SavedState.of([state_of(0, 1, 7)]).rows("weights", first, stop)


@pytest.mark.parametrize(
    "ranges", [[(0, 4), (5, 9)], [(0, 5), (4, 9)], [(1, 9)], [(0, 8)], [(0, 9), (0, 9)], [(0, 10)], []]
)
def test_a_gap_or_rows_held_twice_are_an_error_that_names_the_tensor(ranges):
    with pytest.raises(ValueError, match="of the 9 rows of W_enc these are there"):
        covering("W_enc", 9, [Extent(first, stop, torch.zeros(stop - first)) for first, stop in ranges])


def test_a_single_number_is_one_row():
    saved = SavedState.of([TrainingState({"step": Piece.whole(torch.tensor(3.0))}, {})])
    assert saved.rows("step").tolist() == [3.0]
