"""Every engine on 1, 2 and 4 real processes equals one process.

Each of 30 steps starts from the state that the readable step of one process had there, in float32, where numbers and
gradients differ by 1e-5 at most and no score lies so near the cut that other pairs may be selected; then 30 steps
follow one another in float64, beside a step that is written out in `plain_step`. Dead latents are revived, gradients
are clipped in some steps, and of some batches one rank has nearly all winners, by its tokens or by its latents.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from equal import D_MODEL, NUM_STEPS, SKEWED, batches, copied, initial_state, part, positive, run, scaling, settings
from equal_cases import FREE, FROM_EACH, NARROW
from plain_step import WEIGHTS, PlainRun
from pool import pool_of

from train.pieces import SavedState
from train.ranks import Group

pytestmark = pytest.mark.slow
REFERENCES = {str(case.reference()): case.reference() for case in (*FROM_EACH, *FREE, *NARROW)}
BETA = 0.9
# torch's fused Adam takes the clip in float32, whatever the weights are in; steps add that up.
CLIP_ROUNDING = 1e-6
# Forms round in different places. float32 sums of some dozens of terms agree to 1e-5, whatever the case; bf16 has 8
# bits, and the operands of a product, its result and what is multiplied next are rounded by up to 2**-8 each.
ROUNDING, NARROW_ROUNDING = 1e-5, 4 * 2**-8
# Steps from states in which the first quarter of the latents, the first of 4 ranks', has nearly all winners.
SKEWED_LATENTS = range(5, NUM_STEPS, 9)
COUNTS = ("train/dead", "train/l0", "train/lr")


@cache
def start_of(key):
    """The first weights of a problem, with some latents that stay silent, as one process draws them."""
    state = alone(initial_state, REFERENCES[key])
    state.tensors["crosscoder.b_enc"].rows[5::6] = -3.0
    return state


@cache
def reference_of(key):
    """The states before 30 steps of the reference, some made uneven, and the trace of a step from each of them."""
    case = REFERENCES[key]
    free = alone(run, case, batches(case), [saved(start_of(key))] + [None] * (NUM_STEPS - 1))
    states = [start_of(key), *free.states[:-1]]
    for t in SKEWED_LATENTS:
        states[t] = copied(states[t])
        states[t].tensors["crosscoder.W_enc"].rows[: case.num_latents // 4] *= 10
    states = [saved(state) for state in states]
    return states, alone(run, case, batches(case), states)


def alone(function, case, *arguments):
    """The result of the one rank."""
    return pool_of(1).run(function, case, *arguments)[0]


def saved(*states):
    return SavedState.of(states)


def weights_of(state):
    return {name: state.rows(f"crosscoder.{name}") for name in WEIGHTS}


@pytest.mark.parametrize("case", FROM_EACH, ids=str)
def test_each_step_from_the_same_state_is_the_same(case):
    states, expected = reference_of(str(case.reference()))
    traces = pool_of(case.num_ranks).run(run, case, batches(case), states)
    assert_equal_steps(case, states, expected, traces, ROUNDING)


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_each_step_in_bf16_is_nearly_the_same(case):
    states, expected = reference_of(str(case.reference()))
    traces = pool_of(case.num_ranks).run(run, case, batches(case), states)
    assert_equal_steps(case, states, expected, traces, NARROW_ROUNDING)


def assert_equal_steps(case, states, expected, traces, rounding):
    """Numbers and gradients within `rounding`; other pairs selected only where as near to the cut.

    In bf16, in which many scores lie near the cut, n of S selected pairs may be others: sums over pairs may then differ
    by their share n / S more, and gradients, which add up vectors of different directions, in their norm by its root.
    """
    for t, before in enumerate(states):
        metrics = traces[0].metrics[t]
        assert all(trace.metrics[t] == metrics for trace in traces), t
        selected = [pair for trace in traces for pair in trace.selected[t]]
        assert len(set(selected)) == len(selected), t
        differing = set(selected) ^ set(expected.selected[t])
        assert_near_the_cut(case, before, batches(case)[t], expected.selected[t], differing, rounding)
        share = len(differing) / len(expected.selected[t]) if rounding == NARROW_ROUNDING else 0.0
        assert positive(metrics) == pytest.approx(positive(expected.metrics[t]), rel=rounding + share), t
        after, reference_after = saved(*(trace.states[t] for trace in traces)), saved(expected.states[t])
        for name in WEIGHTS:
            wanted = gradient(before, reference_after, name)
            off = (gradient(before, after, name) - wanted).norm() / wanted.norm()
            assert off <= rounding + share**0.5, (t, name)
        if not differing:
            assert {name: metrics[name] for name in COUNTS} == {name: expected.metrics[t][name] for name in COUNTS}, t
            assert torch.equal(after.rows("silent_tokens"), reference_after.rows("silent_tokens")), t


def assert_near_the_cut(case, state, batch, selected, differing, bound):
    score_BL = scores_of(case, state, batch)
    cut = min(score_BL[pair].item() for pair in selected)
    assert all(score_BL[pair].item() == pytest.approx(cut, rel=bound) for pair in differing)


def scores_of(case, state, batch):
    plain = PlainRun(settings(case), weights_of(state), *scaling(case))
    return plain.encode(plain.scaled(batch[0]))[1]


def gradient(before, after, name):
    """The clipped gradient of a step, from Adam's first moment: m' = b m + (1 - b) g."""
    moments = [state.rows(f"adam.{name}.exp_avg").double() for state in (before, after)]
    return (moments[1] - BETA * moments[0]) / (1 - BETA)


@pytest.mark.parametrize("key", sorted({str(case.reference()) for case in FROM_EACH}))
def test_no_score_lies_so_near_the_cut_that_rounding_moves_it_across(key):
    """In float32 all must select the same pairs: the best score left out is far enough below the last one selected."""
    states, expected = reference_of(key)
    for t, (state, batch) in enumerate(zip(states, batches(REFERENCES[key]), strict=True)):
        ranked = scores_of(REFERENCES[key], state, batch).flatten().sort(descending=True).values
        number = len(expected.selected[t])
        assert ranked[number] < (1 - 2 * ROUNDING) * ranked[number - 1], t


@pytest.mark.parametrize("name", ["train/loss", "train/threshold", "train/grad_norm", *WEIGHTS])
def test_three_times_the_bound_is_noticed(name):
    """A number, or the gradient of a weight, that is off by a factor of 1 + 3 * ROUNDING in one step."""
    case, t = FROM_EACH[0], 10
    states, expected = reference_of(str(case.reference()))
    metrics, after = list(expected.metrics), list(expected.states)
    assert_equal_steps(case, states, expected, [expected], ROUNDING)
    if name in metrics[t]:
        metrics[t] = metrics[t] | {name: metrics[t][name] * (1 + 3 * ROUNDING)}
    else:
        after[t] = copied(after[t])
        moment = after[t].tensors[f"adam.{name}.exp_avg"].rows
        moment += (1 - BETA) * 3 * ROUNDING * gradient(states[t], saved(expected.states[t]), name)
    with pytest.raises(AssertionError, match=name):
        assert_equal_steps(case, states, expected, [expected._replace(metrics=metrics, states=after)], ROUNDING)


@pytest.mark.parametrize("case", FREE, ids=str)
def test_steps_in_float64_stay_the_same(case):
    start = saved(start_of(str(case.reference())))
    traces = pool_of(case.num_ranks).run(run, case, batches(case), [start] + [None] * (NUM_STEPS - 1))
    plain = PlainRun(settings(case), weights_of(start), *scaling(case))
    for t, (x_BMD, _) in enumerate(batches(case)):
        outcome, metrics = plain.step(x_BMD), traces[0].metrics[t]
        assert all(trace.metrics[t] == metrics for trace in traces), t
        assert sorted(pair for trace in traces for pair in trace.selected[t]) == sorted(outcome.selected), t
        state = saved(*(trace.states[t] for trace in traces))
        assert state.rows("silent_tokens").tolist() == outcome.silent, t
        assert {name: metrics[name] for name in COUNTS} == {name: outcome.numbers[name] for name in COUNTS}, t
        assert positive(metrics) == pytest.approx(positive(outcome.numbers), rel=CLIP_ROUNDING), t
    for name, weight in plain.weights.items():
        torch.testing.assert_close(state.rows(f"crosscoder.{name}"), weight.detach(), rtol=0, atol=CLIP_ROUNDING)


@pytest.mark.parametrize("case", [case for case in FROM_EACH if case.step == "sparse"], ids=str)
def test_first_weights_are_the_same(case):
    expected = saved(alone(initial_state, case.reference()))
    found = saved(*pool_of(case.num_ranks).run(initial_state, case))
    assert found.names == expected.names and found.values == expected.values
    for name in found.names:
        assert torch.equal(found.rows(name), expected.rows(name)), name


def test_the_steps_hold_what_they_should():
    """Dead latents, more than AuxK takes for a token; clipped and other gradients; one rank with nearly all winners."""
    case = FROM_EACH[0]
    _, trace = reference_of(str(case.reference()))
    assert sum(metrics["train/dead"] > D_MODEL // 2 and metrics["train/auxk"] > 0 for metrics in trace.metrics) > 10
    clipped = [metrics["train/grad_norm"] > settings(case).training.max_grad_norm for metrics in trace.metrics]
    assert 5 < sum(clipped) < NUM_STEPS - 5
    for t in (*SKEWED, *SKEWED_LATENTS):
        tokens = part(batches(case)[t], Group(0, 4))[1].tolist()
        of_rank = [token in tokens if t in SKEWED else latent < 12 for token, latent in trace.selected[t]]
        assert sum(of_rank) > 0.9 * len(of_rank)
