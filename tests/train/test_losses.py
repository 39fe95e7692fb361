"""The readable step: every formula against loops over tokens, models and latents, and gradients against finite
differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from plain_readable import readable_losses

from extract.errors import BadInput
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.losses import ErrorSums, auxk_loss, delta_loss, loss_share, reconstruction_loss
from train.readable import largest


def random_crosscoder(seed=0, num_models=2, d_model=5, num_latents=9, **config):
    generator = torch.Generator().manual_seed(seed)
    config = CrosscoderConfig(num_latents=num_latents, k=2, **config)
    crosscoder = Crosscoder(config, [f"m{i}" for i in range(num_models)], d_model, "block0").double()
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        crosscoder.zero_foreign_rows(crosscoder.W_enc, crosscoder.W_dec)
    x_BMD = torch.randn(7, num_models, d_model, dtype=torch.float64, generator=generator)
    return crosscoder, x_BMD


def loop_losses(crosscoder, x_BMD, num_selected, dead):
    """The whole step, one number at a time."""
    config, (num_tokens, num_models, width) = crosscoder.config, x_BMD.shape
    enc, dec = (w.detach().view(-1, num_models, width).tolist() for w in (crosscoder.W_enc, crosscoder.W_dec))
    b_enc, b_dec = crosscoder.b_enc.tolist(), crosscoder.b_dec.detach().view(num_models, width).tolist()
    x, num_latents = x_BMD.tolist(), config.num_latents
    models, dims = range(num_models), range(width)
    norm = lambda values: math.sqrt(sum(v * v for v in values))  # noqa: E731
    if config.code_normalization == "crosscoder":
        scale = [sum(norm(dec[j][m]) for m in models) for j in range(num_latents)]
    elif config.code_normalization == "sae":
        scale = [norm([dec[j][m][d] for m in models for d in dims]) for j in range(num_latents)]
    else:
        scale = [1.0] * num_latents
    pre = [
        [max(0.0, b_enc[j] + sum(x[t][m][d] * enc[j][m][d] for m in models for d in dims)) for j in range(num_latents)]
        for t in range(num_tokens)
    ]
    places = [(t, j) for t in range(num_tokens) for j in range(num_latents)]
    ranked = sorted((-pre[t][j] * scale[j], t, j) for t, j in places if pre[t][j] > 0)
    chosen = {(t, j) for _, t, j in ranked[:num_selected]}
    recons = [
        [[b_dec[m][d] + sum(pre[t][j] * dec[j][m][d] for s, j in chosen if s == t) for d in dims] for m in models]
        for t in range(num_tokens)
    ]
    error = [[[x[t][m][d] - recons[t][m][d] for d in dims] for m in models] for t in range(num_tokens)]
    power = 2 if config.loss == "squared" else 1
    norms = [norm(error[t][m]) for t in range(num_tokens) for m in models]
    reconstruction = sum(value**power for value in norms) / (num_tokens * num_models)
    differences = [[error[t][m][d] - error[t][0][d] for d in dims] for t in range(num_tokens) for m in models if m > 0]
    delta = sum(norm(difference) for difference in differences) / num_tokens
    mean = [[sum(error[t][m][d] for t in range(num_tokens)) / num_tokens for d in dims] for m in models]
    squared_error = variance = 0.0
    for t in range(num_tokens):
        best = sorted(dead, key=lambda j: -pre[t][j] * scale[j])[: min(width // 2, len(dead))]
        for m in models:
            for d in dims:
                squared_error += (error[t][m][d] - sum(pre[t][j] * dec[j][m][d] for j in best)) ** 2
                variance += (error[t][m][d] - mean[m][d]) ** 2
    auxk = squared_error / variance if dead else 0.0
    return chosen, reconstruction, auxk, delta


def dead_mask(dead, num_latents):
    return torch.tensor([j in dead for j in range(num_latents)])


CASES = [
    {},
    {"code_normalization": "sae"},
    {"code_normalization": "none"},
    {"loss": "squared"},
    {"dedicated": 0.25},
    {"delta_weight": 0.7},
    {"loss": "squared", "delta_weight": 0.3, "dedicated": 0.4, "code_normalization": "sae"},
]


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dead", [[], [4], [0, 2, 3, 8]])
@pytest.mark.parametrize("num_models", [2, 3])
def test_step_equals_loops_over_tokens_models_and_latents(config, dead, num_models):
    config = {**config, "dedicated": config.get("dedicated", 0.0) * 2 / num_models}
    crosscoder, x_BMD = random_crosscoder(seed=len(dead), num_models=num_models, auxk_alpha=0.1, **config)
    selection, _, losses, *_ = readable_losses(crosscoder, x_BMD, 14, dead_mask(dead, 9))
    chosen, reconstruction, auxk, delta = loop_losses(crosscoder, x_BMD, 14, dead)
    assert set(zip(*(part.tolist() for part in selection), strict=True)) == chosen
    assert losses.reconstruction.item() == pytest.approx(reconstruction, rel=1e-12)
    assert losses.auxk.item() == pytest.approx(auxk, rel=1e-12)
    weight = crosscoder.config.delta_weight
    assert losses.delta.item() == pytest.approx(delta if weight else 0.0, rel=1e-12)
    assert losses.total.item() == pytest.approx(
        reconstruction + 0.1 * auxk + weight * (delta if weight else 0), rel=1e-12
    )


def variance_of(error_BMD, num_tokens=None):
    sums = ErrorSums(error_BMD[0].numel(), error_BMD.device).add(error_BMD)
    return sums.variance(num_tokens or len(error_BMD), error_BMD.dtype)


def test_hand_derived_losses():
    error_BMD = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [6.0, 8.0]]])
    assert reconstruction_loss(error_BMD, "norm", 2).item() == (5 + 0 + 0 + 10) / 4
    assert reconstruction_loss(error_BMD, "squared", 2).item() == (25 + 0 + 0 + 100) / 4
    assert delta_loss(error_BMD, 2).item() == (5 + 10) / 2
    # Means over tokens: (1.5, 2), (3, 4); squared deviations 2 * (2.25 + 4) + 2 * (9 + 16) = 62.5. Reconstructing zero
    # leaves 125.
    assert variance_of(error_BMD).item() == 62.5
    assert auxk_loss(error_BMD, torch.zeros_like(error_BMD), variance_of(error_BMD)).item() == 125 / 62.5


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 5], [0, 6, 1]])
@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("num_models", [2, 3])
def test_shares_of_tokens_add_up_to_the_loss_and_its_gradient(num_models, config, sizes):
    """A share knows its own tokens, the number of all, and the variance of all."""
    generator = torch.Generator().manual_seed(len(sizes))
    settings = CrosscoderConfig(**{**config, "dedicated": 0.0})
    error, error_recons = (torch.randn(7, num_models, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    whole = [error.clone().requires_grad_(), error_recons.clone().requires_grad_()]
    expected = loss_share(settings, whole[0], 7, whole[1], variance_of(error))
    expected.total.backward()
    parts = [error.clone().requires_grad_(), error_recons.clone().requires_grad_()]
    sums = ErrorSums(num_models * 5, error.device)
    for part in error.split(sizes):
        sums.add(part)
    variance = sums.variance(7, torch.float64)
    shares = [
        loss_share(settings, own, 7, recons, variance)
        for own, recons in zip(parts[0].split(sizes), parts[1].split(sizes), strict=True)
    ]
    sum(share.total for share in shares).backward()
    for name in ("total", "reconstruction", "auxk", "delta"):
        share_sum = sum(getattr(share, name).item() for share in shares)
        assert share_sum == pytest.approx(getattr(expected, name).item(), rel=1e-12)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_the_variance_of_float32_errors_far_from_zero_is_that_of_float64(monkeypatch):
    """Squares of 300, in float32 or summed in it, would leave no digit of a variance of 1e-4 a token."""
    monkeypatch.setattr("train.losses.PIECE_SIZE", 50)
    generator = torch.Generator().manual_seed(0)
    error_BMD = 300 + 0.004 * torch.randn(64, 2, 3, generator=generator)
    exact = (error_BMD.double() - error_BMD.double().mean(0)).square().sum().item()
    assert variance_of(error_BMD).item() == pytest.approx(exact, rel=1e-5)


def test_gradients_at_zero_error_are_zero():
    error_BMD = torch.zeros(2, 3, 4, requires_grad=True)
    (reconstruction_loss(error_BMD, "norm", 2) + delta_loss(error_BMD, 2)).backward()
    assert error_BMD.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_equal_errors_have_no_variance_and_no_auxk(num_tokens, dtype):
    error_BMD = torch.full((num_tokens, 2, 3), 1 / 3, dtype=dtype)
    error_recons_BMD = torch.ones(num_tokens, 2, 3, dtype=dtype, requires_grad=True)
    loss = auxk_loss(error_BMD, error_recons_BMD, variance_of(error_BMD))
    loss.backward()
    assert loss.item() == 0
    assert error_recons_BMD.grad.count_nonzero() == 0


@pytest.mark.parametrize("config", CASES)
def test_gradients_equal_finite_differences(config):
    """Central differences of the loops' objective; the residual that AuxK targets and the batch variance are constants
    to it.
    """
    crosscoder, x_BMD = random_crosscoder(seed=5, auxk_alpha=0.3, **config)
    dead_L = dead_mask([1, 6, 7], 9)
    readable = readable_losses(crosscoder, x_BMD, 14, dead_L)
    error_BMD = readable.error_BMD.detach()
    readable.losses.total.backward()

    def objective():
        with torch.no_grad():
            now = readable_losses(crosscoder, x_BMD, 14, dead_L)
            without_auxk = now.losses.total - 0.3 * now.losses.auxk
            return (without_auxk + 0.3 * auxk_loss(error_BMD, now.error_recons_BMD, variance_of(error_BMD))).item()

    generator = torch.Generator().manual_seed(1)
    for weight in crosscoder.parameters():
        flat, gradient = weight.detach().view(-1), weight.grad.view(-1)
        for i in torch.randperm(len(flat), generator=generator)[:12].tolist():
            before, step = flat[i].item(), 1e-6
            flat[i] = before + step
            above = objective()
            flat[i] = before - step
            below = objective()
            flat[i] = before
            assert gradient[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7)


def test_auxk_trains_encoder_and_decoder_of_dead_latents_and_not_the_bias():
    crosscoder, x_BMD = random_crosscoder(seed=3)
    readable = readable_losses(crosscoder, x_BMD, 14, dead_mask([2, 5, 6], 9))
    error_BMD = readable.error_BMD.detach()
    auxk_loss(error_BMD, readable.error_recons_BMD, variance_of(error_BMD)).backward()
    for weight in (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec):
        touched = weight.grad.view(9, -1).abs().sum(1) > 0
        assert touched.any()
        assert not touched[[0, 1, 3, 4, 7, 8]].any()
    assert crosscoder.b_dec.grad is None


@pytest.mark.parametrize("num_selected", [0, 1, 7, 30, 63, 64, 500])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_largest_scores_are_those_of_a_stable_sort(levels, num_selected):
    generator = torch.Generator().manual_seed(levels)
    score_BL = torch.randint(-levels // 3, levels + 1, (8, 8), generator=generator).float()
    ranked = sorted((-score_BL[t, j].item(), t, j) for t in range(8) for j in range(8) if score_BL[t, j] > 0)
    selection = largest(score_BL, num_selected)
    assert list(zip(*(part.tolist() for part in selection), strict=True)) == sorted(
        (t, j) for _, t, j in ranked[:num_selected]
    )


def test_scores_that_cannot_be_ranked_are_refused():
    with pytest.raises(BadInput, match="training.step=readable cannot rank 65536 tokens x 32768 latents"):
        largest(torch.zeros(1, 1).expand(65536, 32768), 5)
    with pytest.raises(FloatingPointError):
        largest(torch.tensor([[1.0, math.nan]]), 1)


def test_without_a_dead_latent_there_is_no_auxiliary_loss():
    """Even where an engine gave the zero reconstruction of latents that may die soon: the variance is then 0."""
    error_BMD = torch.ones(4, 2, 3)
    losses = loss_share(CrosscoderConfig(auxk_alpha=0.5), error_BMD, 4, torch.zeros(4, 2, 3), torch.zeros(()))
    assert losses.auxk.item() == 0.0
    assert losses.total.item() == losses.reconstruction.item()
