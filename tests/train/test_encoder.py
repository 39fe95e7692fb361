"""The encoder product in chunks: what it computes, and that its memory does not grow with the number of latents."""

from __future__ import annotations

import pytest
import torch

from train import encoder
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import CHUNK_BYTES, Copies, Operands, chunk_latents, encoder_chunks


def random_crosscoder(num_latents=37, code_normalization="crosscoder"):
    generator = torch.Generator().manual_seed(0)
    config = CrosscoderConfig(num_latents=num_latents, k=2, code_normalization=code_normalization)
    crosscoder = Crosscoder(config, ["a", "b"], 5, "block0")
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return crosscoder, torch.randn(9, 10, generator=generator)


@pytest.mark.parametrize("chunk_bytes", [1, 9 * 4 * 5, 9 * 4 * 37, 1 << 20])
def test_chunks_are_the_columns_of_the_whole_product(monkeypatch, chunk_bytes):
    monkeypatch.setitem(encoder.CHUNK_BYTES, "cpu", chunk_bytes)
    crosscoder, x_BW = random_crosscoder()
    expected_BL = x_BW @ crosscoder.W_enc.detach().T + crosscoder.b_enc.detach()
    position, memory = 0, set()
    for first, pre_BC in encoder_chunks(x_BW, Operands.of(crosscoder)):
        assert first == position
        torch.testing.assert_close(pre_BC, expected_BL[:, first : first + pre_BC.shape[1]])
        position += pre_BC.shape[1]
        memory.add(pre_BC.data_ptr())
    assert position == 37
    assert len(memory) == 1


def test_a_chunk_fits_its_bytes_and_holds_one_latent_at_least():
    assert chunk_latents(1024, 16384, 4, "cpu") == CHUNK_BYTES["cpu"] // 4096 == 4096
    assert chunk_latents(4096, 114688, 2, "cuda") == 8192
    assert chunk_latents(10**9, 50, 4, "cpu") == 1
    assert chunk_latents(8, 50, 4, "cpu") == 50


def test_bf16_operands_are_rounded_copies_that_refresh_reads_again():
    crosscoder, x_BW = random_crosscoder()
    copies = Copies(crosscoder, torch.bfloat16)
    operands = copies.operands
    assert operands.W_dec.data_ptr() == crosscoder.W_dec.data_ptr()
    with torch.no_grad():
        crosscoder.W_enc.mul_(1.3)
        crosscoder.b_enc.add_(1.0)
        crosscoder.W_dec.mul_(2.0)
    copies.refresh()
    exact_BL = x_BW.bfloat16().double() @ crosscoder.W_enc.bfloat16().double().T + crosscoder.b_enc.bfloat16().double()
    for first, pre_BC in encoder_chunks(x_BW, operands):
        assert pre_BC.dtype == torch.bfloat16
        columns_BC = exact_BL[:, first : first + pre_BC.shape[1]]
        torch.testing.assert_close(pre_BC.double(), columns_BC, rtol=2**-7, atol=1e-6)
    assert torch.equal(operands.scale_L, crosscoder.latent_scale())


@pytest.mark.parametrize("kind", ["crosscoder", "sae", "none"])
def test_the_scale_comes_from_decoder_norms_at_hand(kind):
    crosscoder, _ = random_crosscoder(code_normalization=kind)
    norms_LM = torch.arange(74.0).view(37, 2)
    expected = {"crosscoder": norms_LM.sum(1), "sae": norms_LM.square().sum(1).sqrt(), "none": torch.ones(37)}[kind]
    copies = Copies(crosscoder)
    copies.norms_LM.copy_(norms_LM)
    copies.refresh_small()
    torch.testing.assert_close(copies.operands.scale_L, expected)
