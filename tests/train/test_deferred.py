"""The way of a GPU, on CPU tensors: no step waits for the device unless it is measured, and nothing else differs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from engines import assert_same_state, batches, engine_of, saved, silent_for, snapshot
from planted import settings_of
from torch.utils._python_dispatch import TorchDispatchMode

from train.pieces import Piece, SavedState


def deferred_engine(tmp_path, crosscoder=None):
    """An engine that goes the way of a GPU, on CPU tensors."""
    engine = engine_of(tmp_path, crosscoder=crosscoder)
    engine._deferred = True
    return engine


def run(engine, data, measure_every, recount_steps=100):
    engine._clocks.recount_steps = recount_steps
    engine.initialise(data[0])
    for number, raw in enumerate(data):
        metrics = engine.step(raw, measured=number % measure_every == measure_every - 1)
        assert bool(metrics) == (number % measure_every == measure_every - 1)
    return engine.state()


@pytest.mark.parametrize("measure_every", [1, 7])
@pytest.mark.parametrize("deferred", [False, True])
def test_measuring_changes_no_bit(tmp_path, deferred, measure_every):
    engines = engine_of(tmp_path), engine_of(tmp_path)
    for engine in engines:
        engine._deferred = deferred
    data = batches(28)
    assert_same_state(run(engines[0], data, 4), run(engines[1], data, measure_every))


@pytest.mark.parametrize("recount_steps", [1, 2, 5, 100])
def test_the_way_of_a_gpu_gives_the_same_run_whenever_the_dead_are_counted(tmp_path, recount_steps):
    """Sums over latents that are not dead after all add zeros, which may change the order of a sum, no more."""
    config = settings_of(tmp_path).crosscoder
    config.dead_after_tokens = 24 * 32
    data = batches(60)
    expected = run(engine_of(tmp_path, crosscoder=config), data, 4)
    found = run(deferred_engine(tmp_path, crosscoder=config), data, 5, recount_steps)
    for name in ("steps_done", "threshold"):
        assert found.values[name] == pytest.approx(expected.values[name], rel=1e-5)
    assert torch.equal(found.tensors["silent_tokens"].rows, expected.tensors["silent_tokens"].rows)
    assert (expected.tensors["silent_tokens"].rows > 24 * 32).any()
    for name in expected.tensors.keys() - {"auxk_candidates"}:
        torch.testing.assert_close(found.tensors[name].rows, expected.tensors[name].rows, rtol=0, atol=1e-5)


def test_a_run_resumed_on_the_way_of_a_gpu_continues_bit_for_bit(tmp_path):
    """What was a candidate of AuxK and fired since is still summed over, and so it is after loading."""
    config = settings_of(tmp_path).crosscoder
    config.dead_after_tokens = 8 * 32
    engine, other = (deferred_engine(tmp_path, crosscoder=config) for _ in range(2))
    data = batches(40)
    engine.initialise(data[0])
    for raw in data[:30]:
        engine.step(raw, measured=False)
    state = engine.state()
    silent_L = state.tensors["silent_tokens"].rows
    assert 0 < (silent_L >= 8 * 32).sum() < 32
    state.tensors["auxk_candidates"] = Piece.whole(torch.ones(32, dtype=torch.uint8))
    engine.load_state(SavedState.of([replace(state, values=state.values | {"auxk_tokens": 3 * 32, "auxk_any": True})]))
    engine.step(data[30])
    other.load_state(saved(engine))
    for raw in data[31:33]:
        assert engine.step(raw) == other.step(raw)
    assert_same_state(engine.state(), other.state())
    assert other.state().tensors["auxk_candidates"].rows.sum() == 32
    engine.step(data[33])
    assert engine.state().tensors["auxk_candidates"].rows.sum() < 32


class Waits(TorchDispatchMode):
    """Counts operators whose result, or whose shape of it, the host must wait for on a GPU."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "bincount", "unique", "equal", "item")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masked = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or name.startswith(self.NAMES):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


def test_an_unmeasured_step_makes_the_host_wait_for_nothing(tmp_path):
    """On the way of a GPU, once warm; a measured step shows that the watch works."""
    config = settings_of(tmp_path).crosscoder
    config.dead_after_tokens, config.delta_weight = 24 * 32, 0.5
    engine = deferred_engine(tmp_path, crosscoder=config)
    data = batches(40)
    engine.initialise(data[0])
    engine._clocks.load(silent_for(torch.full((32,), 23 * 32)))
    waits, num_dead = [], 0
    for raw in data:
        num_dead += int(engine._clocks.dead().sum())
        with Waits() as seen:
            engine.step(raw, measured=False)
        waits.append(seen.found)
    assert num_dead > 0
    counted = [number for number, found in enumerate(waits) if found]
    assert {tuple(waits[number]) for number in counted} == {("_local_scalar_dense", "nonzero")}  # whether any, which
    assert counted == list(range(0, 40, 3))  # the dead are counted for dead_after_tokens / 8 tokens ahead
    with Waits() as seen:
        engine.step(data[0])
    assert "_local_scalar_dense" in seen.found


@pytest.mark.parametrize("where", ["activations", "encoder"])
def test_a_bad_step_that_is_noticed_late_has_changed_nothing(tmp_path, where):
    """Steps after it do nothing either, the message names it, and the run can go on from there."""
    engine, twin = deferred_engine(tmp_path), deferred_engine(tmp_path)
    data = batches(14)
    for run_of in (engine, twin):
        run_of.initialise(data[0])
        for raw in data[:7]:
            run_of.step(raw, measured=False)
    before = snapshot(engine)
    bad = data[7].clone()
    bad[3, 1, 2] = math.nan
    if where == "encoder":
        bad = data[7] * 1e38
    for raw in (bad, *data[8:11]):
        assert engine.step(raw, measured=False) == {}
    assert engine.steps_done == 11
    with pytest.raises(FloatingPointError, match="At step 7 the loss is"):
        engine.step(data[11])
    assert engine.steps_done == 7
    assert_same_state(before, engine.state())
    for raw in data[7:]:
        engine.step(raw, measured=False)
        twin.step(raw, measured=False)
    assert_same_state(twin.state(), engine.state())
    engine.step(bad, measured=False)
    with pytest.raises(FloatingPointError, match="At step 14"):
        engine.state()
