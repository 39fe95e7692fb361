"""The way of a GPU on several ranks, on CPU tensors: padded selections, candidates of AuxK, waits; resuming."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from equal import Case, batches, copied, engine_of, part
from pool import pool_of
from test_deferred import Waits

from train import batch_topk
from train.pieces import SavedState
from train.world import World

STEPS, DEAD_AFTER = 16, 24 * 32  # candidates are counted for three steps at a time
CASES = [
    Case("fsdp", 2),
    Case("latent", 2),
    Case("latent", 4, options={"ranks_per_copy": 2}),
    Case("latent", 2, training={"num_micro_steps": 2}),
    Case("fsdp", 2, training={"num_micro_steps": 4}),
    Case("fsdp", 2, "readable"),
    Case("latent", 4, "readable", {"ranks_per_copy": 2}, {"num_micro_steps": 2}),
]


def problem(case):
    return replace(case, crosscoder={"dead_after_tokens": DEAD_AFTER})


def run(world, case, deferred, first, last, states):
    """Metrics of the steps [first, last) and this rank's state after them, from the states of other ranks."""
    torch.set_default_dtype(torch.float64)
    engine = engine_of(world, problem(case))
    engine._deferred = deferred
    engine.load_state(SavedState.of(states))
    data = [part(batch, world.everyone) for batch in batches(case, last)[first:]]
    with mock.patch.object(batch_topk, "Growing", None if deferred else batch_topk.Growing):  # which a GPU cannot run
        metrics = [engine.step(x_bMD, token_b=token_b) for x_bMD, token_b in data]
    return metrics, copied(engine.state())


def first_state():
    """Of one process: a third of the latents hardly ever fires, and dies after some steps; some are revived."""
    torch.set_default_dtype(torch.float64)
    try:
        case = problem(Case("single", 1))
        engine = engine_of(World.alone(), case)
        engine.initialise(batches(case)[0][0])
        state = copied(engine.state())
    finally:
        torch.set_default_dtype(torch.float32)
    state.tensors["crosscoder.b_enc"].rows[::3] = -4.0
    state.tensors["silent_tokens"].rows[::3] = torch.arange(DEAD_AFTER - 16 * 20, DEAD_AFTER, 20)
    return state


def on_ranks(case, deferred, first, last, states=None):
    """The metrics, the same on all ranks, and the states of all."""
    results = pool_of(case.num_ranks).run(run, case, deferred, first, last, states or [first_state()])
    assert all(metrics == results[0][0] for metrics, _ in results)
    return results[0][0], [state for _, state in results]


def assert_close(ours, theirs):
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-8)


@pytest.fixture(scope="module")
def expected():
    return on_ranks(Case("single", 1, "readable"), False, 0, STEPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_way_of_a_gpu_gives_the_same_on_ranks(case, expected):
    metrics, states = on_ranks(case, True, 0, STEPS)
    assert max(each["train/dead"] for each in metrics) > 3
    assert max(each["train/auxk"] for each in metrics) > 0
    assert_close(metrics, expected[0])
    counters, others = (SavedState.of(each).rows("silent_tokens") for each in (states, expected[1]))
    assert torch.equal(counters, others)


def test_other_engines_continue_on_other_ranks(expected):
    """single 1 -> latent 4 -> fsdp 2 -> single 1, on the way of a GPU, in the middle of dying latents."""
    metrics, states = [], []
    chain = [Case("single", 1), Case("latent", 4), Case("fsdp", 2), Case("single", 1, "readable")]
    for number, case in enumerate(chain):
        found, states = on_ranks(case, True, 4 * number, 4 * number + 4, states)
        metrics += found
    assert_close(metrics, expected[0])


def refused(world, case, states):
    """Whether scores that are not finite end the step and leave the weights."""
    engine = engine_of(world, problem(case))
    engine._deferred = True
    engine.load_state(SavedState.of(states))
    before = copied(engine.state())
    x_bMD, token_b = part(batches(case, 1)[0], world.everyone)
    # Where they are left out with the padding, the loss is finite.
    with pytest.raises(FloatingPointError, match="At step 0 .* (nan|Scores are not: the weights hold nan or inf)"):
        engine.step(x_bMD, token_b=token_b)
    after = engine.state().tensors
    names = [name for name in after if name != "auxk_candidates"]
    return all(after[name].rows.allclose(before.tensors[name].rows, 0, 0, equal_nan=True) for name in names)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_that_are_not_finite_stop_all_ranks(case):
    state = first_state()
    state.tensors["crosscoder.b_enc"].rows[40] = torch.nan
    assert pool_of(case.num_ranks).run(refused, case, [state]) == [True] * case.num_ranks


def waits_of(world, case, states):
    engine = engine_of(world, problem(case))
    engine._deferred, found = True, []
    engine.load_state(SavedState.of(states))
    for x_bMD, token_b in [part(batch, world.everyone) for batch in batches(case, STEPS)]:
        with Waits() as seen:
            engine.step(x_bMD, measured=False, token_b=token_b)
        found.append(seen.found)
    return found


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_unmeasured_steps_on_ranks_wait_only_to_count_candidates(case):
    waits = pool_of(case.num_ranks).run(waits_of, case, [first_state()])
    assert {tuple(found) for rank in waits for found in rank} <= {
        (),
        ("_local_scalar_dense",),
        ("_local_scalar_dense", "nonzero"),
    }
    assert any("nonzero" in found for found in waits[0])


def test_engines_are_imported_when_they_are_asked_for():
    text = (
        "import sys; from train.engine import ENGINES; print(*ENGINES, *(name in sys.modules for name in sys.argv[1:]))"
    )
    names = ["deepspeed", "train.zero", "train.fsdp", "train.latent"]
    found = subprocess.run([sys.executable, "-c", text, *names], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["single", "fsdp", "deepspeed", "latent", *["False"] * 4]
