"""A step in micro-batches is one step: the same selection, losses and gradients, AuxK's variance included."""

from __future__ import annotations

import pytest
import torch
from engines import batches, engine_of, measured
from forms import readable, sparse
from planted import settings_of
from test_sparse import crosscoder_of

from extract.errors import BadInput
from extract.metrics_file import Histogram
from train.config import CrosscoderConfig
from train.encoder import Copies
from train.micro_batches import MicroBatches
from train.placement import Share
from train.products import Gradients

NUM_TOKENS, NUM_LATENTS = 12, 30
CASES = [
    {},
    {"loss": "squared"},
    {"delta_weight": 0.7, "code_normalization": "sae"},
    {"dedicated": 0.2, "delta_weight": 0.4},
]


def case(num_models, config, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_models)
    settings = CrosscoderConfig(num_latents=NUM_LATENTS, k=2, auxk_alpha=0.5, **config)
    crosscoder = crosscoder_of(generator, num_models, 6, settings, dtype)
    x_BMD = torch.randn(NUM_TOKENS, num_models, 6, dtype=dtype, generator=generator)
    x_BMD[:3] *= 20  # the first micro-batch holds most winners, and most of the error's variance
    return crosscoder, x_BMD


def assert_equal(found, expected, tolerance=1e-11):
    for ours, theirs in zip(found.selected.selection, expected.selected.selection, strict=True):
        assert torch.equal(ours[found.selected.score_S > 0], theirs)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        scale = theirs.abs().max().item() or 1.0
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dead", [0, 2, 30])
@pytest.mark.parametrize("number", [2, 4, 12])
@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("num_models", [2, 3])
def test_micro_batches_equal_one_batch(num_models, config, number, dead):
    """None dead, fewer than AuxK chooses, all."""
    crosscoder, x_BMD = case(num_models, config)
    dead_L = torch.arange(NUM_LATENTS) % max(1, NUM_LATENTS // max(1, dead)) == 0 if dead else torch.zeros(30).bool()
    assert dead_L.sum() == dead
    expected = readable(crosscoder, x_BMD, 24, dead_L)
    assert (expected.losses[2] > 0) == (dead > 0)
    assert (expected.selected.selection.token < 3).sum() > 15
    for form in (readable, sparse):
        assert_equal(form(crosscoder, x_BMD, 24, dead_L, number=number), expected)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_micro_batches_on_the_way_of_a_gpu_equal_one_batch(number):
    """Padding belongs to no micro-batch, candidates need not be dead, and gradients are added where they lie."""
    crosscoder, x_BMD = case(2, {"dedicated": 0.2})
    dead_L = torch.arange(NUM_LATENTS) < 4
    with torch.no_grad():
        crosscoder.b_enc -= 15  # few scores are positive
    expected = readable(crosscoder, x_BMD, 200, dead_L)
    assert 0 < len(expected.selected.score_S) < 150
    into = Gradients.like(*crosscoder.parameters())
    for weight, gradient in zip(crosscoder.parameters(), into[:4], strict=True):
        weight.grad = gradient.fill_(torch.nan)
    task = {"number": number, "candidate_Z": torch.arange(9), "fixed_size": True}
    task["operands"] = Copies(crosscoder).operands
    found = sparse(crosscoder, x_BMD, 200, dead_L, into, **task)
    assert len(found.selected.score_S) == 200
    assert_equal(found, expected)


def test_a_single_micro_batch_is_scaled_once_and_not_copied():
    crosscoder, x_BMD = case(2, {})
    one = MicroBatches(crosscoder, Share(NUM_LATENTS), x_BMD, None, 1)
    assert one.scaled(0) is one.scaled(0)
    assert one.own(0).data_ptr() == one.scaled(0).data_ptr()
    assert (len(one), one.rows, one.num_tokens) == (1, 12, 12)
    crosscoder.activation_mean.fill_(2.0)
    three = MicroBatches(crosscoder, Share(NUM_LATENTS), x_BMD, torch.arange(11, -1, -1), 3)
    assert torch.equal(torch.cat([three.scaled(number) for number in range(3)]), x_BMD - 2.0)
    assert three.token_B.tolist() == list(range(11, -1, -1))


@pytest.mark.parametrize("step", ["readable", "sparse"])
@pytest.mark.parametrize("deferred", [False, True])
def test_runs_in_micro_steps_equal_a_run_in_whole_ones(tmp_path, step, deferred):
    """Latents die on the way; float64 keeps rounding from changing a selection."""
    runs = []
    torch.set_default_dtype(torch.float64)
    try:
        for num_micro_steps in (1, 2, 8):
            config = settings_of(tmp_path).crosscoder
            config.dead_after_tokens, config.delta_weight = 96, 0.2
            engine = engine_of(tmp_path, step, crosscoder=config, num_micro_steps=num_micro_steps)
            engine._deferred = deferred
            data = [x_BMD.double() for x_BMD in batches(30)]
            engine.initialise(data[0])
            metrics = [engine.step(x_BMD) for x_BMD in data]
            runs.append((metrics, engine.state(), engine.evaluate(measured(data[:3]))))
    finally:
        torch.set_default_dtype(torch.float32)
    (metrics, state, validation), *others = runs
    assert max(each["train/dead"] for each in metrics) > 3
    assert max(each["train/auxk"] for each in metrics) > 0
    for other_metrics, other_state, other_validation in others:
        for ours, theirs in zip(other_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert numbers(other_validation) == pytest.approx(numbers(validation), rel=1e-9)
        assert torch.equal(other_state.tensors["silent_tokens"].rows, state.tensors["silent_tokens"].rows)
        assert other_state.values["threshold"] == pytest.approx(state.values["threshold"], rel=1e-9)
        for name, piece in state.tensors.items():
            torch.testing.assert_close(other_state.tensors[name].rows, piece.rows, rtol=1e-7, atol=1e-9)


def numbers(metrics):
    """The metrics with, of each histogram, how many values it holds: rounding may move one into the next bin."""
    return {name: sum(v.counts) if isinstance(v, Histogram) else v for name, v in metrics.items()}


def test_micro_steps_that_do_not_divide_the_batch_are_refused(tmp_path):
    engine = engine_of(tmp_path, num_micro_steps=5)
    data = batches(1)
    engine.initialise(data[0])
    with pytest.raises(BadInput, match="training.num_micro_steps=5 does not divide the 32 tokens of a rank"):
        engine.step(data[0])
