"""Clipped Adam against torch's own optimiser, and the step that is skipped."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import Copies
from train.optimiser import ClippedAdam, Written

NO = torch.tensor(False)


def parts(max_norm, dtype=None):
    crosscoder = Crosscoder(CrosscoderConfig(num_latents=7, k=2), ["a", "b"], 4, "block0")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    copies = Copies(crosscoder, dtype)
    written = {"W_dec": Written(copies.operands.W_dec, copies.norms_LM)}
    adam = ClippedAdam(dict(crosscoder.named_parameters()), (0.9, 0.99), max_norm, written)
    return crosscoder, copies, adam, generator


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_equals_clip_grad_norm_and_adam(max_norm):
    crosscoder, copies, adam, generator = parts(max_norm, torch.bfloat16)
    twins = [weight.detach().clone().requires_grad_() for weight in crosscoder.parameters()]
    weights = list(crosscoder.named_parameters())
    reference = torch.optim.Adam(twins, lr=1.0, betas=(0.9, 0.99))
    for number in range(1, 6):
        rate = 0.01 * number
        gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights}
        for gradient, twin in zip(gradients.values(), twins, strict=True):
            twin.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        adam.step(gradients, number, rate, norm, NO)
        assert not adam.writes
        copies.refresh()
        for weight, twin in zip(crosscoder.parameters(), twins, strict=True):
            torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)
        assert torch.equal(copies.norms_LM, crosscoder.decoder_norms())
        assert torch.equal(copies.operands.scale_L, crosscoder.latent_scale())
        assert torch.equal(copies.operands.W_enc, crosscoder.W_enc.bfloat16())
        assert torch.equal(copies.operands.b_enc, crosscoder.b_enc.bfloat16())


def test_a_skipped_step_changes_nothing_whatever_the_gradients():
    crosscoder, _, adam, _ = parts(1.0)
    weights = [weight.detach().clone() for weight in crosscoder.parameters()]
    gradients = {name: torch.full_like(weight, torch.nan) for name, weight in crosscoder.named_parameters()}
    adam.step(gradients, 1, 0.1, torch.tensor(torch.nan), torch.tensor(True))
    for weight, before in zip(crosscoder.parameters(), weights, strict=True):
        assert torch.equal(weight, before)
    assert all(tensor.count_nonzero() == 0 for tensor in adam.moments().values())


@pytest.mark.parametrize("parts_of_rows", [(0, 3, 7), (0, 0, 7), (0, 1, 2, 7)])
def test_rows_divided_over_ranks_are_updated_as_one(parts_of_rows):
    """Each rank has a range of rows, maybe none, and is told the norm of the whole gradient."""
    crosscoder, _, adam, generator = parts(0.5)
    ranges = list(pairwise(parts_of_rows))
    before = {name: weight.detach().clone() for name, weight in crosscoder.named_parameters()}
    divided = [{name: weight[first:stop].clone() for name, weight in before.items()} for first, stop in ranges]
    adams = [ClippedAdam(weights, (0.9, 0.99), 0.5) for weights in divided]
    for number in range(1, 4):
        gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in before.items()}
        norm = torch.nn.utils.get_total_norm(gradients.values())
        for (first, stop), other in zip(ranges, adams, strict=True):
            rows = {name: gradient[first:stop].clone() for name, gradient in gradients.items()}
            other.step(rows, number, 0.1, norm, NO)
        adam.step(gradients, number, 0.1, norm, NO)
    for name in ("W_enc", "b_enc", "W_dec"):
        weight, moments = crosscoder.get_parameter(name), adam.moments()
        assert torch.equal(torch.cat([weights[name] for weights in divided]), weight)
        for moment in (f"{name}.exp_avg", f"{name}.exp_avg_sq"):
            assert torch.equal(torch.cat([other.moments()[moment] for other in adams]), moments[moment])
