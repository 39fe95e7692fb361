"""Counters of a run, by hand, and that what is not finite stops them until it is read."""

from __future__ import annotations

import math

import pytest
import torch
from engines import silent_for

from train.clocks import Clocks, NotFinite
from train.config import CrosscoderConfig
from train.pieces import SavedState, TrainingState
from train.placement import Share

YES, NO = torch.tensor(True), torch.tensor(False)


def clocks_of(**config):
    return Clocks(CrosscoderConfig(num_latents=6, k=2, **config), 6, Share(6), torch.device("cpu"))


def selected(latents, scores):
    return torch.tensor(latents, dtype=torch.int64), torch.tensor(scores)


def test_silence_and_threshold_by_hand():
    clocks = clocks_of(threshold_start_step=1, threshold_decay=0.75, dead_after_tokens=30)
    clocks.advance(*selected([0, 3, 3], [5.0, 1.0, 2.0]), 10, 0, NO)
    assert clocks.silent_tokens_L.tolist() == [0, 10, 10, 0, 10, 10]
    assert clocks.threshold is None
    clocks.advance(*selected([1], [4.0]), 10, 1, NO)
    assert clocks.threshold == 4.0
    clocks.advance(*selected([0, 1], [3.0, 2.0]), 10, 2, NO)
    assert clocks.threshold == 0.75 * 4.0 + 0.25 * 2.0
    assert clocks.silent_tokens_L.tolist() == [0, 0, 30, 20, 30, 30]
    assert clocks.dead().tolist() == [False, False, True, False, True, True]


def test_padding_neither_fires_nor_sets_the_threshold():
    clocks = clocks_of(threshold_start_step=0)
    clocks.advance(*selected([2, 5, 5], [3.0, 0.0, 0.0]), 10, 0, NO)
    assert clocks.silent_tokens_L.tolist() == [10, 10, 0, 10, 10, 10]
    assert clocks.threshold == 3.0
    clocks.advance(*selected([5, 5], [0.0, 0.0]), 10, 1, NO)
    assert clocks.threshold == 3.0


@pytest.mark.parametrize("recount_steps", [1, 3, 100])
def test_the_latents_that_can_die_soon_hold_all_that_are_dead(recount_steps):
    """Random firing for 200 steps; a wait for the device is one in several steps."""
    clocks = clocks_of(dead_after_tokens=160)
    clocks.recount_steps = recount_steps
    generator = torch.Generator().manual_seed(0)
    counts, before, superset, none = 0, None, 0, 0
    for step in range(200):
        candidates = clocks.candidates(10, exact=False)
        dead = clocks.dead().nonzero().flatten().tolist()
        assert clocks.any_dead() == bool(dead)
        exact = clocks.candidates(10, exact=True)
        assert (exact is None and not dead) or exact.tolist() == dead
        if candidates is None:
            assert not dead
            none += 1
            continue_with = []
        else:
            counts, before = counts + (candidates is not before), candidates
            continue_with = candidates.tolist()
        assert set(dead) <= set(continue_with)
        superset += len(continue_with) - len(dead)
        fired = (torch.rand(6, generator=generator) < 0.03).nonzero().flatten().tolist()
        clocks.advance(*selected(fired, [1.0] * len(fired)), 10, step, NO)
    assert 0 < none < 200
    # 160 // 8 tokens are two steps.
    assert counts == (200 - none) / (1 if recount_steps == 1 else 2)
    assert superset > 0 or recount_steps == 1


@pytest.mark.parametrize("part", range(3))
def test_a_failure_stops_everything_until_it_is_raised(part):
    clocks = clocks_of(threshold_start_step=0)
    values = [torch.tensor(1.0), torch.tensor(2.0), YES]
    assert not clocks.judge(6, *values)
    clocks.raise_if_failed()
    clocks.advance(*selected([1], [2.0]), 10, 6, NO)
    values[part] = NO if part == 2 else torch.tensor(math.nan)
    assert clocks.judge(7, *values)
    failed = clocks.judge(8, torch.tensor(1.0), torch.tensor(1.0), YES)
    assert failed
    clocks.advance(*selected([2], [1.0]), 10, 8, failed)
    assert clocks.silent_tokens_L.tolist() == [10, 0, 10, 10, 10, 10]
    assert clocks.threshold == 2.0
    with pytest.raises(NotFinite, match="step 7") as error:
        clocks.raise_if_failed()
    assert error.value.step == 7
    clocks.raise_if_failed()
    assert not clocks.judge(7, torch.tensor(1.0), torch.tensor(2.0), YES)


def test_loaded_counters_are_copies():
    clocks, saved = clocks_of(), torch.arange(6)
    clocks.load(silent_for(saved, 0.5))
    clocks.advance(*selected([1], [2.0]), 10, 0, NO)
    assert saved.tolist() == [0, 1, 2, 3, 4, 5]
    assert clocks.threshold == 0.5
    clocks.load(silent_for(saved))
    assert clocks.threshold is None


def test_after_loading_the_dead_are_counted_at_once():
    """Latents that were not dead before the load may be now, and no step may miss them."""
    clocks = clocks_of(dead_after_tokens=800)
    assert clocks.candidates(10, exact=False) is None
    clocks.load(silent_for(torch.tensor([0, 900, 0, 0, 0, 0])))
    assert clocks.any_dead()
    assert clocks.candidates(10, exact=False).tolist() == [1]


def test_candidates_are_saved_with_the_steps_that_they_are_valid_for():
    """Latent 1 could die within the two steps that were counted for; it fires, and is a candidate in the second."""
    clocks, other = (clocks_of(dead_after_tokens=160) for _ in range(2))
    clocks.load(silent_for(torch.tensor([200, 150, 0, 0, 0, 0])))
    assert clocks.candidates(10, exact=False).tolist() == [0, 1]
    clocks.advance(*selected([1], [2.0]), 10, 0, NO)
    other.load(SavedState.of([TrainingState(clocks.pieces(), clocks.values())]))
    for loaded in (clocks, other):
        assert loaded.dead().tolist() == [True] + [False] * 5
        assert loaded.candidates(10, exact=False).tolist() == [0, 1]
        assert loaded.candidates(10, exact=False).tolist() == [0]
