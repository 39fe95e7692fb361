"""One process: clocks, clipping, schedule, and what a planted dictionary leaves after a short run."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from engines import assert_same_state, batches, engine_of, measured, saved, snapshot
from plain_readable import readable_losses
from planted import settings_of
from scipy.optimize import linear_sum_assignment

from extract.errors import BadInput
from train.config import CrosscoderConfig, TrainingConfig
from train.engine import Engine, learning_rate_factor
from train.metrics import VarianceExplained, validation_metrics
from train.world import World


def test_learning_rate_rises_stays_and_falls():
    config = TrainingConfig(num_tokens=100, num_tokens_per_step=1, warmup_steps=4, decay_fraction=0.2)
    factors = [learning_rate_factor(config, step) for step in range(100)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[5:81] == [1.0] * 76
    assert factors[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 100)])
    config.decay_fraction, config.warmup_steps = 0.0, 0
    assert {learning_rate_factor(config, step) for step in range(100)} == {1.0}


@pytest.mark.parametrize("step", ["readable", "sparse"])
def test_steps_equal_adam_written_out(tmp_path, step):
    """Clipping by the global norm, the schedule, bias-corrected Adam and the clocks, in float64 loops over steps."""
    engine = engine_of(tmp_path, step)
    training = settings_of(tmp_path).training
    engine._placement._adam._max_norm = 0.3
    data = batches(20)
    engine.initialise(data[0])
    slow = deepcopy(engine.crosscoder).double()
    first = [torch.zeros_like(weight) for weight in slow.parameters()]
    second = [torch.zeros_like(weight) for weight in slow.parameters()]
    silent, threshold, clipped, dead_seen = [0] * 32, None, 0, 0
    for t, raw in enumerate(data):
        x_BMD = (raw.double() - slow.activation_mean) * slow.activation_scale[:, None]
        dead_L = torch.tensor([tokens >= 192 for tokens in silent])
        dead_seen += int(dead_L.sum())
        slow.zero_grad()
        selection, score_S, losses, *_ = readable_losses(slow, x_BMD, 3 * 32, dead_L)
        losses.total.backward()
        slow.zero_foreign_rows(slow.W_enc.grad, slow.W_dec.grad)
        norm = math.sqrt(sum(weight.grad.square().sum().item() for weight in slow.parameters()))
        clipped += norm > 0.3
        rate = 1e-2 * learning_rate_factor(training, t)
        with torch.no_grad():
            for weight, m, v in zip(slow.parameters(), first, second, strict=True):
                gradient = weight.grad * min(1.0, 0.3 / norm)
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).add_(gradient.square(), alpha=0.001)
                weight -= rate * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        fired = set(selection.latent.tolist())
        silent = [0 if j in fired else tokens + 32 for j, tokens in enumerate(silent)]
        smallest = min(score_S.tolist())
        if t >= 5:
            threshold = smallest if threshold is None else 0.9 * threshold + 0.1 * smallest
        metrics = engine.step(raw)
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert metrics["train/lr"] == rate
        assert metrics["train/dead"] == int(dead_L.sum())
        assert metrics["train/l0"] == len(score_S) / 32
        assert engine._clocks.silent_tokens_L.tolist() == silent
        if threshold is None:
            assert "train/threshold" not in metrics
        else:
            assert metrics["train/threshold"] == pytest.approx(threshold, rel=1e-4)
    assert clipped > 0
    assert dead_seen > 0
    for ours, theirs in zip(engine.crosscoder.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=0, atol=2e-4)
    foreign = engine.crosscoder.foreign_rows()
    assert foreign.sum() == 8
    for weight in (engine.crosscoder.W_enc, engine.crosscoder.W_dec):
        assert weight.detach().view(32, 2, 6)[foreign].count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", ["readable", "sparse"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, step, bad):
    engine = engine_of(tmp_path, step)
    data = batches(8)
    engine.initialise(data[0])
    for raw in data[:7]:
        engine.step(raw)
    before = snapshot(engine)
    data[7][3, 1, 2] = bad
    with pytest.raises(FloatingPointError):
        engine.step(data[7])
    assert_same_state(before, engine.state())


def test_a_gradient_that_overflows_changes_nothing(tmp_path):
    """Codes stay finite, the error is finite, its square is not."""
    engine = engine_of(tmp_path, crosscoder=CrosscoderConfig(num_latents=32, k=3, loss="squared"))
    data = batches(2)
    engine.initialise(data[0])
    before = snapshot(engine)
    with pytest.raises(FloatingPointError, match="loss is"):
        engine.step(data[1] * 1e25)
    assert_same_state(before, engine.state())


def test_coded_activations_and_other_devices_are_refused(tmp_path):
    engine = engine_of(tmp_path)
    with pytest.raises(BadInput, match="Activations are torch.int8"):
        engine.step(torch.ones(32, 2, 6, dtype=torch.int8))
    with pytest.raises(BadInput, match="training.device=meta is not supported: training runs on cpu or cuda"):
        engine_of(tmp_path, training=TrainingConfig(device="meta"))


@pytest.mark.parametrize("step", ["readable", "sparse"])
def test_bf16_trains_like_fp32_on_fp32_weights(tmp_path, step):
    losses = {}
    for precision in ("fp32", "bf16"):
        training = settings_of(tmp_path).training
        training.precision = precision
        engine = engine_of(tmp_path, step, training=training)
        data = batches(40)
        engine.initialise(data[0])
        losses[precision] = [engine.step(raw)["train/loss"] for raw in data]
        assert {piece.rows.dtype for name, piece in engine.state().tensors.items() if "adam" in name} == {torch.float32}
        assert engine.crosscoder.W_enc.dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_validation_changes_nothing(tmp_path):
    engine = engine_of(tmp_path)
    data = batches(8)
    engine.initialise(data[0])
    assert "val/variance_explained/tuned" in engine.evaluate(measured(data))
    for raw in data:
        engine.step(raw)
        before = snapshot(engine)
        engine.evaluate(measured(data))
        assert_same_state(before, engine.state())


def test_a_loaded_state_continues_bit_for_bit(tmp_path):
    engine, other = engine_of(tmp_path), engine_of(tmp_path)
    data = batches(14)
    engine.initialise(data[0])
    for raw in data[:9]:
        engine.step(raw)
    other.load_state(saved(engine))
    for raw in data[9:]:
        ours, theirs = engine.step(raw), other.step(raw)
        assert ours == theirs
    assert_same_state(engine.state(), other.state())


def test_variance_explained_of_batches_equals_the_formula_at_once():
    generator = torch.Generator().manual_seed(0)
    x, recons = (torch.randn(50, 2, 3, generator=generator, dtype=torch.float64) + 7 for _ in range(2))
    recons = 0.2 * recons + 0.8 * x
    explained = VarianceExplained(2, 3, torch.device("cpu"))
    for start in (0, 13, 40):
        end = {0: 13, 13: 40, 40: 50}[start]
        explained.add(x[start:end], recons[start:end])
    for m in range(2):
        mean = x[:, m].mean(0)
        expected = 1 - sum((x[t, m] - recons[t, m]).square().sum() for t in range(50)) / sum(
            (x[t, m] - mean).square().sum() for t in range(50)
        )
        assert explained.values()[m] == pytest.approx(expected.item(), rel=1e-12)


def test_validation_uses_inference_codes_once_there_is_a_threshold(tmp_path):
    engine = engine_of(tmp_path)
    data = batches(3)
    engine.initialise(data[0])
    assert validation_metrics(engine.crosscoder, measured(data))["val/l0"] == 3.0
    engine.crosscoder.threshold = 0.5
    acts = torch.cat([engine.crosscoder.encode(x) for x in data])
    metrics = validation_metrics(engine.crosscoder, measured(data))
    assert metrics["val/l0"] == int((acts > 0).sum()) / 96
    x, recons = engine.crosscoder.scale(torch.cat(data)), engine.crosscoder.scale(engine.crosscoder.decode(acts))
    for m, model in enumerate(("base", "tuned")):
        expected = 1 - (x[:, m] - recons[:, m]).square().sum() / (x[:, m] - x[:, m].mean(0)).square().sum()
        assert metrics[f"val/variance_explained/{model}"] == pytest.approx(expected.item(), rel=1e-4)


def planted_batches(count, num_tokens, generator):
    """Sparse nonnegative codes of 8 directions of the base alone, 8 of the tuned model alone, 16 shared ones."""
    directions = torch.nn.functional.normalize(torch.randn(32, 2, 24, generator=generator), dim=2)
    directions[:16] *= torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8)[:, :, None]
    directions[16:, 1] = directions[16:, 0]
    data = []
    for _ in range(count):
        active = torch.rand(num_tokens, 32, generator=generator) < 3 / 32
        codes = active * (1 + torch.rand(num_tokens, 32, generator=generator))
        data.append(torch.einsum("bl,lmd->bmd", codes, directions))
    return directions, data


def test_a_planted_dictionary_is_recovered_and_owners_are_right(tmp_path):
    config = CrosscoderConfig(
        num_latents=64,
        k=3,
        dedicated=0.125,
        threshold_start_step=100,
        threshold_decay=0.99,
        dead_after_tokens=5000,
        init="data",
    )
    training = TrainingConfig(
        num_tokens=700 * 256, num_tokens_per_step=256, lr=4e-3, warmup_steps=50, decay_fraction=0.3, device="cpu"
    )
    settings = settings_of(tmp_path)
    settings.crosscoder, settings.training = config, training
    engine = Engine(settings, ["base", "tuned"], 24, torch.zeros(2, 24), torch.ones(2), World.alone())
    directions, data = planted_batches(720, 256, torch.Generator().manual_seed(0))
    engine.initialise(data[0])
    for raw in data[:700]:
        engine.step(raw)
    crosscoder = engine.crosscoder
    cosine = (
        torch.nn.functional.normalize(directions.flatten(1), dim=1)
        @ torch.nn.functional.normalize(crosscoder.W_dec.detach(), dim=1).T
    )
    planted, found = linear_sum_assignment(-cosine.numpy())
    assert (cosine[planted, found] > 0.9).float().mean() > 0.9
    owner = crosscoder.dedicated_owner[found]
    recovered = cosine[planted, found] > 0.9
    norms = crosscoder.decoder_norms()[found]
    for model, group in ((0, slice(0, 8)), (1, slice(8, 16))):
        assert all(owner[group][recovered[group]] != 1 - model)
        share = norms[group, model] / norms[group].sum(1)
        assert (share[recovered[group]] > 0.8).all()
        assert (owner[group] == model).any()
    explained = engine.evaluate(measured(data[700:]))
    assert min(explained[f"val/variance_explained/{model}"] for model in ("base", "tuned")) > 0.8
    assert explained["val/l0"] == pytest.approx(3, rel=0.25)
