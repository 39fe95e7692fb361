"""The sparse step equals the readable one: losses, gradients, selection."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.losses import readable_forward, training_losses
from train.metrics import evaluation_codes
from train.sparse import sparse_forward, sparse_reconstruction


def crosscoder_of(generator, num_models, d_model, config, dtype):
    crosscoder = Crosscoder(config, [f"m{i}" for i in range(num_models)], d_model, "block0").to(dtype)
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        crosscoder.zero_foreign_rows(crosscoder.W_enc, crosscoder.W_dec)
    return crosscoder


def step(form, crosscoder, x_BMD, num_selected, dead_L):
    crosscoder.zero_grad()
    forward = form(crosscoder, x_BMD, num_selected, dead_L)
    losses = training_losses(crosscoder.config, x_BMD, forward)
    losses.total.backward()
    crosscoder.zero_foreign_rows(crosscoder.W_enc.grad, crosscoder.W_dec.grad)
    return forward, losses, [weight.grad.clone() for weight in crosscoder.parameters()]


def assert_equal_steps(crosscoder, x_BMD, num_selected, dead_L, tolerance):
    forward, losses, gradients = step(readable_forward, crosscoder, x_BMD, num_selected, dead_L)
    other_forward, other_losses, other_gradients = step(sparse_forward, crosscoder, x_BMD, num_selected, dead_L)
    for ours, theirs in zip(forward.selection, other_forward.selection, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(other_forward.score_S, forward.score_S, rtol=0, atol=0)
    for name in ("total", "reconstruction", "auxk", "delta"):
        assert getattr(other_losses, name).item() == pytest.approx(getattr(losses, name).item(), rel=tolerance)
    for ours, theirs in zip(gradients, other_gradients, strict=True):
        scale = ours.abs().max().item() or 1.0
        torch.testing.assert_close(theirs / scale, ours / scale, rtol=0, atol=tolerance)
    return forward


@pytest.mark.parametrize("seed", range(40))
def test_equal_over_random_cases(seed):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=generator))]  # noqa: E731
    num_models, d_model, num_latents = pick(1, 2, 3), pick(1, 4, 17), pick(6, 40, 150)
    config = CrosscoderConfig(
        num_latents=num_latents,
        k=2,
        code_normalization=pick("crosscoder", "sae", "none"),
        loss=pick("norm", "squared"),
        dedicated=pick(0.0, 0.2),
        delta_weight=pick(0.0, 0.6),
        auxk_alpha=pick(0.0, 0.5),
    )
    double = seed % 2 == 0
    crosscoder = crosscoder_of(generator, num_models, d_model, config, torch.float64 if double else torch.float32)
    x_BMD = torch.randn(pick(1, 9, 64), num_models, d_model, generator=generator).to(crosscoder.W_enc.dtype)
    dead_L = torch.rand(num_latents, generator=generator) < pick(0.0, 0.1, 0.6)
    num_selected = pick(0, 1, 2, 20) * len(x_BMD)
    assert_equal_steps(crosscoder, x_BMD, num_selected, dead_L, 1e-12 if double else 3e-6)


def small(seed=0, **config):
    generator = torch.Generator().manual_seed(seed)
    crosscoder = crosscoder_of(generator, 2, 6, CrosscoderConfig(num_latents=30, k=2, **config), torch.float64)
    return crosscoder, torch.randn(16, 2, 6, dtype=torch.float64, generator=generator)


def test_no_active_latent_leaves_only_the_decoder_bias_to_learn():
    crosscoder, x_BMD = small()
    with torch.no_grad():
        crosscoder.b_enc.fill_(-1e6)
    forward = assert_equal_steps(crosscoder, x_BMD, 32, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert len(forward.score_S) == 0
    _, _, (*weights, b_dec) = step(sparse_forward, crosscoder, x_BMD, 32, torch.zeros(30, dtype=torch.bool))
    assert all(gradient.count_nonzero() == 0 for gradient in weights)
    assert b_dec.count_nonzero() == 12


def test_one_latent_takes_all_tokens():
    crosscoder, x_BMD = small()
    with torch.no_grad():
        crosscoder.b_enc[7] = 1e4
    forward = assert_equal_steps(crosscoder, x_BMD, 16, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert forward.selection.latent.unique().tolist() == [7]


def test_more_wanted_than_positive():
    crosscoder, x_BMD = small()
    forward = assert_equal_steps(crosscoder, x_BMD, 10_000, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert len(forward.score_S) == int((crosscoder.pre_activations(x_BMD) > 0).sum())


def test_all_latents_dead_and_more_than_auxk_takes():
    crosscoder, x_BMD = small(auxk_alpha=0.5)
    assert_equal_steps(crosscoder, x_BMD, 32, torch.ones(30, dtype=torch.bool), 1e-12)


@pytest.mark.parametrize("threshold", [None, 0.0, 1.5, 1e9])
def test_the_sparse_decode_equals_the_dense_one(threshold):
    """Codes of the k * B selection, all positive ones, some, and none."""
    crosscoder, x_BMD = small()
    crosscoder.threshold = threshold
    selection, code_S = evaluation_codes(crosscoder, x_BMD)
    acts_BL = torch.zeros(len(x_BMD), 30, dtype=code_S.dtype)
    for token, latent, code in zip(*selection, code_S, strict=True):
        acts_BL[token, latent] = code
    if threshold is not None:
        pre_BL = crosscoder.pre_activations(x_BMD)
        assert torch.equal(acts_BL, torch.where(pre_BL * crosscoder.latent_scale() > threshold, pre_BL, 0.0))
    assert (len(code_S) == 0) == (threshold == 1e9)
    recons_BMD = sparse_reconstruction(crosscoder, selection, code_S, len(x_BMD))
    torch.testing.assert_close(recons_BMD, crosscoder.reconstruct(acts_BL).detach(), rtol=1e-12, atol=1e-12)


class LargestResult(TorchDispatchMode):
    """Records the largest dense tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_temporary_holds_a_vector_for_every_selected_code():
    """Of B = 64 tokens, L = 50 latents, W = 80 and S = 1280 codes, S * W would be 102,400."""
    generator = torch.Generator().manual_seed(0)
    crosscoder = crosscoder_of(generator, 2, 40, CrosscoderConfig(num_latents=50, k=20), torch.float32)
    x_BMD = torch.randn(64, 2, 40, generator=generator)
    with LargestResult() as seen:
        forward, _, _ = step(sparse_forward, crosscoder, x_BMD, 20 * 64, torch.arange(50) < 10)
    assert len(forward.score_S) == 1280
    assert seen.largest == 64 * 80  # the batch itself, larger than the weights and the codes


def test_dedicated_rows_get_no_gradient():
    crosscoder, x_BMD = small(dedicated=0.2, auxk_alpha=0.5)
    dead_L = torch.arange(30) % 3 == 0
    _, _, (W_enc, _, W_dec, _) = step(sparse_forward, crosscoder, x_BMD, 32, dead_L)
    for gradient in (W_enc, W_dec):
        assert gradient.view(30, 2, 6)[:6, 1].count_nonzero() == 0
        assert gradient.view(30, 2, 6)[6:12, 0].count_nonzero() == 0
        assert gradient.view(30, 2, 6)[:6, 0].count_nonzero() > 0
