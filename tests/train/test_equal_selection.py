"""Every engine on 1, 2 and 4 real processes selects exactly what a stable sort of all scores does.

Weights and activations are small integers, and so are decoder norms: every order of summation gives the same scores,
to the last bit, and most of them several times over.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from equal import D_MODEL, NUM_TOKENS, copied, generator, initial_state, run, scaling, settings
from equal_cases import FROM_EACH
from plain_step import WEIGHTS, PlainRun
from pool import pool_of

from train.pieces import SavedState

NUM_BATCHES = 6


def integers(low, high, seed, *shape):
    return torch.randint(low, high, shape, generator=generator(seed)).float()


@cache
def integer_batches(num_models):
    """(batch, tokens in the order in which ranks share them)."""
    x_BMD = [integers(-2, 3, seed, NUM_TOKENS, num_models, D_MODEL) for seed in range(NUM_BATCHES)]
    return [(x.bfloat16(), torch.randperm(NUM_TOKENS, generator=generator(seed))) for seed, x in enumerate(x_BMD)]


def integer_state(case, template, seed):
    """One entry of each decoder row, model by model, is not zero."""
    state, shape = copied(template), (case.num_latents, case.num_models, D_MODEL)
    place_LM1 = torch.randint(0, D_MODEL, (*shape[:2], 1), generator=generator(seed))
    W_dec = torch.zeros(shape).scatter_(2, place_LM1, integers(1, 4, seed, *shape[:2], 1))
    state.tensors["crosscoder.W_enc"].rows.copy_(integers(-1, 2, seed, *shape).flatten(1))
    state.tensors["crosscoder.b_enc"].rows.copy_(integers(-3, 4, seed, case.num_latents))
    state.tensors["crosscoder.W_dec"].rows.copy_(W_dec.flatten(1))
    return SavedState.of([state])


def wanted(case, state, x_BMD):
    """The chosen places in the order of (token, latent), and how many others have the smallest of their scores."""
    plain = PlainRun(settings(case), {name: state.rows(f"crosscoder.{name}") for name in WEIGHTS}, *scaling(case))
    score_BL = plain.encode(plain.scaled(x_BMD))[1]
    assert (score_BL == score_BL.round()).all()
    ranked = [(-score, place) for place, score in enumerate(score_BL.flatten().tolist()) if score > 0]
    chosen = sorted(ranked)[: plain.config.k * NUM_TOKENS]
    num_tied = sum(score == chosen[-1][0] for score, _ in ranked) - sum(score == chosen[-1][0] for score, _ in chosen)
    return sorted(divmod(place, case.num_latents) for _, place in chosen), num_tied


@pytest.mark.parametrize("case", [case for case in FROM_EACH if not case.crosscoder.get("dedicated")], ids=str)
def test_identical_scores_give_the_same_selection(case):
    case = replace(case, crosscoder={**case.crosscoder, "activation_scaling": "none"})
    template = pool_of(1).run(initial_state, case.reference())[0]
    states = [integer_state(case, template, seed) for seed in range(NUM_BATCHES)]
    data = integer_batches(case.num_models)
    traces = pool_of(case.num_ranks).run(run, case, data, states)
    num_tied = 0
    for t, (state, (x_BMD, _)) in enumerate(zip(states, data, strict=True)):
        chosen, num_left_out = wanted(case, state, x_BMD)
        assert sorted(pair for trace in traces for pair in trace.selected[t]) == chosen, t
        num_tied += num_left_out
    assert num_tied > NUM_BATCHES
