"""Sparse inference codes against `Crosscoder.encode`: the same sets and the same bits."""

from __future__ import annotations

import pytest
import torch

from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import CHUNK_BYTES, Operands
from train.inference import inference_codes

MODELS = ["base", "tuned"]


def random_crosscoder(num_latents: int, d_model: int, dtype: torch.dtype, normalization: str) -> Crosscoder:
    config = CrosscoderConfig(num_latents=num_latents, k=8, code_normalization=normalization)
    crosscoder = Crosscoder(config, MODELS, d_model, "block1")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (crosscoder.W_enc, crosscoder.W_dec):
            weight.copy_(torch.randn(weight.shape, generator=generator) / d_model**0.5)
        crosscoder.b_enc.copy_(torch.randn(num_latents, generator=generator) / 4)
    return crosscoder.to(dtype)


@pytest.mark.parametrize("normalization", ["crosscoder", "sae", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 37, 512])
def test_codes_are_those_of_encode_bit_for_bit(
    num_tokens: int, dtype: torch.dtype, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many chunks of latents; the threshold lets one in twenty pass."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", num_tokens * 4 * 100)
    crosscoder = random_crosscoder(700, 16, dtype, normalization)
    x_BMD = torch.randn(num_tokens, 2, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    scores = crosscoder.pre_activations(crosscoder.scale(x_BMD)) * crosscoder.latent_scale()
    crosscoder.threshold = scores.flatten().quantile(0.95).item() if scores.numel() < 1e6 else 1.0
    with torch.no_grad():
        acts_BL = crosscoder.encode(x_BMD)
    selection, code_S = inference_codes(
        crosscoder.threshold, crosscoder.scale(x_BMD).flatten(1), Operands.of(crosscoder)
    )
    token_S, latent_S = acts_BL.nonzero(as_tuple=True)
    assert len(token_S) > 20
    assert torch.equal(selection.token, token_S) and torch.equal(selection.latent, latent_S)
    assert torch.equal(code_S, acts_BL[token_S, latent_S])


@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_without_a_positive_threshold_codes_are_the_positive_ones(threshold: float) -> None:
    crosscoder = random_crosscoder(50, 8, torch.float32, "crosscoder")
    crosscoder.threshold = threshold
    x_BMD = torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(1))
    selection, code_S = inference_codes(threshold, x_BMD.flatten(1), Operands.of(crosscoder))
    acts_BL = crosscoder.encode(x_BMD).detach()
    assert torch.equal(selection.latent, acts_BL.nonzero()[:, 1]) and (code_S > 0).all()


def test_a_watcher_sees_every_pre_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 9 * 4 * 20)
    crosscoder = random_crosscoder(50, 8, torch.float32, "crosscoder")
    x_BW = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    seen: list[tuple[int, torch.Tensor]] = []
    inference_codes(0.5, x_BW, Operands.of(crosscoder), lambda first, pre_BC: seen.append((first, pre_BC.clone())))
    assert [first for first, _ in seen] == [0, 20, 40]
    pre_BL = torch.cat([pre_BC for _, pre_BC in seen], dim=1)
    torch.testing.assert_close(pre_BL, x_BW @ crosscoder.W_enc.detach().T + crosscoder.b_enc.detach())
