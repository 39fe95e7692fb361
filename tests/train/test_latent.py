"""Latents divided among ranks: where dead latents lie, what is sent, and how the whole is put together."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch
from equal import D_MODEL, MODELS, Case, batches, engine_of, initial_state, run, settings
from pool import pool_of
from test_equal import ROUNDING, assert_equal_steps

from benchmarks.traffic import RingTraffic
from extract.errors import BadInput
from train import latent
from train.engine import Engine
from train.latent import gather_rows, latents_of
from train.pieces import SavedState

# Latents of 48 that are dead in the beginning. Ranks have 12 each, AuxK takes D / 2 = 3 for each token.
DEAD = {
    "none": [],
    "one": [17],
    "two ranks have one": [5, 40],
    "all of one rank": range(12, 24),
    "all but those of one rank": range(12, 48),
    "more than enough on each rank": range(0, 48, 2),
    "all": range(48),
}
DEDICATED = {"num_models": 3, "crosscoder": {"dedicated": 0.125}}
CASES = [
    Case("latent", 4, "sparse"),
    Case("latent", 4, "readable"),
    Case("latent", 4, "sparse", {"ranks_per_copy": 2}, {"num_micro_steps": 2}, **DEDICATED),
    Case("latent", 4, "readable", {"ranks_per_copy": 2}, {"num_micro_steps": 2}, **DEDICATED),
    Case("latent", 4, "sparse", {"ranks_per_copy": 1}),
]
REFERENCES = {str(case.reference()): case.reference() for case in CASES}


@cache
def start(reference, name):
    """First weights in which some latents are dead: all ranks' pieces, as one process has them."""
    state = pool_of(1).run(initial_state, REFERENCES[reference])[0]
    state.tensors["silent_tokens"].rows[list(DEAD[name])] = 10_000
    return SavedState.of([state])


@cache
def expected(reference, name):
    case = REFERENCES[reference]
    return pool_of(1).run(run, case, batches(case, 1), [start(reference, name)])[0]


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dead_latents_may_lie_anywhere(case, name):
    reference = str(case.reference())
    before, trace = start(reference, name), expected(reference, name)
    assert trace.metrics[0]["train/dead"] == len(DEAD[name])
    assert (trace.metrics[0]["train/auxk"] > 0) == (len(DEAD[name]) > 0)
    traces = pool_of(4).run(run, case, batches(case, 1), [before])
    assert_equal_steps(case, [before], trace, traces, ROUNDING)


def test_parts_of_latents_are_nearly_equal():
    for num_latents, num_ranks in ((48, 4), (50, 4), (7, 7), (1000, 13)):
        parts = [latents_of(num_latents, rank, num_ranks) for rank in range(num_ranks)]
        assert [number for part in parts for number in part] == list(range(num_latents))
        assert {len(part) for part in parts} <= {num_latents // num_ranks, -(-num_latents // num_ranks)}


def put_together(world, num_rows, block_size):
    everyone = world.everyone
    whole = torch.arange(3 * num_rows).view(num_rows, 3).float()
    own = latents_of(num_rows, everyone.rank, everyone.size)
    into = torch.zeros(num_rows, 3) if everyone.rank == 0 else None
    with mock.patch.object(latent, "BLOCK_SIZE", block_size):
        gather_rows(whole[own.start : own.stop], into, num_rows, everyone)
    return into is None or torch.equal(into, whole)


@pytest.mark.parametrize("num_rows", [4, 7, 40])
@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_rows_are_put_together(num_rows, block_size):
    assert pool_of(4).run(put_together, num_rows, block_size) == [True] * 4


def sent_in_a_step(world, case, d_model):
    """Bytes that this rank sends in a step of a crosscoder of width `d_model`, by kind of collective."""
    scaling = torch.zeros(case.num_models, d_model), torch.ones(case.num_models)
    engine = Engine(settings(case), list(MODELS[: case.num_models]), d_model, *scaling, world)
    x_BMD = torch.randn(32, case.num_models, d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    rank, size = world.everyone.rank, world.everyone.size
    token_b = torch.arange(rank, 32, size) if size > 1 else None
    engine.initialise(x_BMD[rank::size], token_b)
    with RingTraffic() as traffic:
        engine.step(x_BMD[rank::size], measured=False, token_b=token_b)
    return dict(traffic.sent)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_is_sent_grows_with_tokens_as_it_should(num_ranks):
    """Twice the width: x in bf16, partial sums and gradients in fp32, nothing of the size of the weights."""
    case = Case("latent", num_ranks, "sparse", num_models=3)
    narrow, wide = (pool_of(num_ranks).run(sent_in_a_step, case, d_model)[0] for d_model in (8, 16))
    share, numbers = (num_ranks - 1) / num_ranks, 32 * 3 * 8
    grown = {kind: wide[kind] - narrow[kind] for kind in wide}
    assert grown["gather"] == share * numbers * (2 + 4)
    assert grown["reduce-scatter"] == share * numbers * 4
    assert grown["all-reduce"] == 2 * share * 3 * 8 * 4  # the decoder bias


def refused(world, options, num_latents):
    crosscoder = {"num_latents": num_latents, "k": 1}
    with pytest.raises(BadInput) as error:
        engine_of(world, Case("latent", 4, "sparse", options, crosscoder=crosscoder))
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "num_latents", "said"),
    [
        ({"ranks_per_copy": 3}, 48, "engine.ranks_per_copy=3 does not divide the 4 ranks. Nearest: 2 or 4"),
        ({}, 3, "crosscoder.num_latents=3 cannot be divided among 4 ranks"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, num_latents, said):
    messages = pool_of(4).run(refused, options, num_latents)
    assert all(said in message for message in messages)


def test_cases_have_more_dead_latents_than_a_token_takes():
    assert len(DEAD["two ranks have one"]) < D_MODEL // 2 < len(DEAD["all of one rank"])
