"""The sparse step equals the readable one: losses, gradients, selection."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from forms import readable, sparse
from torch.utils._python_dispatch import TorchDispatchMode

from extract.errors import BadInput
from train import encoder
from train.config import CrosscoderConfig
from train.crosscoder import Crosscoder
from train.encoder import Copies, Operands
from train.metrics import evaluation_codes
from train.products import Gradients
from train.sparse import Codes, decode, reconstruct


def crosscoder_of(generator, num_models, d_model, config, dtype):
    crosscoder = Crosscoder(config, [f"m{i}" for i in range(num_models)], d_model, "block0").to(dtype)
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        crosscoder.zero_foreign_rows(crosscoder.W_enc, crosscoder.W_dec)
    return crosscoder


def assert_equal_steps(crosscoder, x_BMD, num_selected, dead_L, tolerance, **task):
    """Compares both forms; the readable one's result."""
    expected = readable(crosscoder, x_BMD, num_selected, dead_L)
    found = sparse(crosscoder, x_BMD, num_selected, dead_L, **task)
    chosen = found.selected.score_S > 0
    for ours, theirs in zip(expected.selected.selection, found.selected.selection, strict=True):
        assert torch.equal(ours, theirs[chosen])
    torch.testing.assert_close(found.selected.score_S[chosen], expected.selected.score_S, rtol=0, atol=0)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    for ours, theirs in zip(expected.gradients, found.gradients, strict=True):
        scale = ours.abs().max().item() or 1.0
        torch.testing.assert_close(theirs / scale, ours / scale, rtol=0, atol=tolerance)
    return expected


def random_case(seed):
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
    dtype = torch.float64 if seed % 2 == 0 else torch.float32
    crosscoder = crosscoder_of(generator, num_models, d_model, config, dtype)
    x_BMD = torch.randn(pick(1, 9, 64), num_models, d_model, generator=generator).to(dtype)
    dead_L = torch.rand(num_latents, generator=generator) < pick(0.0, 0.1, 0.6)
    return crosscoder, x_BMD, pick(0, 1, 2, 20) * len(x_BMD), dead_L, 1e-12 if seed % 2 == 0 else 3e-6


@pytest.mark.parametrize("seed", range(60))
def test_equal_over_random_cases(seed, monkeypatch):
    if seed % 3:  # many chunks of few latents
        monkeypatch.setitem(encoder.CHUNK_BYTES, "cpu", 1 << 10)
    assert_equal_steps(*random_case(seed))


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_the_way_of_a_gpu_gives_the_same(seed):
    """A padded selection, latents that may be dead beside those that are, gradients written where the engine says."""
    crosscoder, x_BMD, num_selected, dead_L, tolerance = random_case(seed)
    into = Gradients.like(crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec)
    every_other = torch.arange(0, len(dead_L), 2)
    candidates = torch.cat([dead_L.nonzero().squeeze(1), every_other]).unique()
    expected = readable(crosscoder, x_BMD, num_selected, dead_L)
    for weight, gradient in zip(crosscoder.parameters(), into[:4], strict=True):
        weight.grad = gradient.fill_(torch.nan)
    other = sparse(
        crosscoder,
        x_BMD,
        num_selected,
        dead_L,
        into,
        candidate_Z=candidates,
        operands=Copies(crosscoder).operands,
        fixed_size=True,
    )
    assert len(other.selected.score_S) == min(num_selected, len(x_BMD) * len(dead_L))
    chosen = other.selected.score_S > 0
    for ours, theirs in zip(expected.selected.selection, other.selected.selection, strict=True):
        assert torch.equal(ours, theirs[chosen])
    assert other.losses == pytest.approx(expected.losses, rel=tolerance)
    for ours, theirs in zip(expected.gradients, other.gradients, strict=True):
        scale = ours.abs().max().item() or 1.0
        torch.testing.assert_close(theirs / scale, ours / scale, rtol=0, atol=tolerance)


def small(seed=0, **config):
    generator = torch.Generator().manual_seed(seed)
    crosscoder = crosscoder_of(generator, 2, 6, CrosscoderConfig(num_latents=30, k=2, **config), torch.float64)
    return crosscoder, torch.randn(16, 2, 6, dtype=torch.float64, generator=generator)


def test_no_active_latent_leaves_only_the_decoder_bias_to_learn():
    crosscoder, x_BMD = small()
    with torch.no_grad():
        crosscoder.b_enc.fill_(-1e6)
    expected = assert_equal_steps(crosscoder, x_BMD, 32, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert len(expected.selected.score_S) == 0
    *weights, b_dec = sparse(crosscoder, x_BMD, 32, torch.zeros(30, dtype=torch.bool)).gradients
    assert all(gradient.count_nonzero() == 0 for gradient in weights)
    assert b_dec.count_nonzero() == 12


def test_one_latent_takes_all_tokens():
    crosscoder, x_BMD = small()
    with torch.no_grad():
        crosscoder.b_enc[7] = 1e4
    expected = assert_equal_steps(crosscoder, x_BMD, 16, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert expected.selected.selection.latent.unique().tolist() == [7]


def test_more_wanted_than_positive():
    crosscoder, x_BMD = small()
    expected = assert_equal_steps(crosscoder, x_BMD, 10_000, torch.zeros(30, dtype=torch.bool), 1e-12)
    assert len(expected.selected.score_S) == int((crosscoder.pre_activations(x_BMD) > 0).sum())


def test_all_latents_dead_and_more_than_auxk_takes():
    crosscoder, x_BMD = small(auxk_alpha=0.5)
    assert_equal_steps(crosscoder, x_BMD, 32, torch.ones(30, dtype=torch.bool), 1e-12)


@pytest.mark.parametrize("threshold", [None, 0.0, 1.5, 1e9])
def test_the_sparse_decode_equals_the_dense_one(threshold):
    """Codes of the k * B selection, all positive ones, some, and none."""
    crosscoder, x_BMD = small()
    crosscoder.threshold = threshold
    selection, code_S = evaluation_codes(crosscoder, x_BMD.flatten(1), Operands.of(crosscoder))
    acts_BL = torch.zeros(len(x_BMD), 30, dtype=code_S.dtype)
    for token, latent, code in zip(*selection, code_S, strict=True):
        acts_BL[token, latent] = code
    if threshold is not None:
        pre_BL = crosscoder.pre_activations(x_BMD)
        assert torch.equal(acts_BL, torch.where(pre_BL * crosscoder.latent_scale() > threshold, pre_BL, 0.0))
    assert (len(code_S) == 0) == (threshold == 1e9)
    assert (code_S > 0).all()
    recons_BMD = decode(selection, code_S, len(x_BMD), Operands.of(crosscoder)).view_as(x_BMD)
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
        found = sparse(crosscoder, x_BMD, 20 * 64, torch.arange(50) < 10)
    assert len(found.selected.score_S) == 1280
    assert seen.largest == 64 * 80  # the batch itself, larger than the weights and the codes


def test_memory_grows_with_a_chunk_and_not_with_the_pre_activations(monkeypatch):
    """B = 300 tokens, L = 2000 latents in chunks of 10: B * L would be 600,000, the weights are L * W = 16,000."""
    monkeypatch.setitem(encoder.CHUNK_BYTES, "cpu", 300 * 10 * 4)
    generator = torch.Generator().manual_seed(0)
    crosscoder = crosscoder_of(generator, 2, 4, CrosscoderConfig(num_latents=2000, k=2), torch.float32)
    x_BMD = torch.randn(300, 2, 4, generator=generator)
    with LargestResult() as seen:
        sparse(crosscoder, x_BMD, 600, torch.arange(2000) < 5)
    assert seen.largest == 2000 * 8
    crosscoder.threshold = 50.0
    with LargestResult() as seen:
        selection, _ = evaluation_codes(crosscoder, x_BMD.flatten(1), Operands.of(crosscoder))
    assert seen.largest <= 2000 * 8
    assert 0 < len(selection.token) < 2000


def test_nothing_is_read_before_it_was_written():
    """Deterministic mode fills fresh memory with nan, or the largest integer."""
    crosscoder, x_BMD = small(auxk_alpha=0.5)
    dead_L = torch.arange(30) % 3 == 0
    expected = sparse(crosscoder, x_BMD, 32, dead_L)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = sparse(crosscoder, x_BMD, 32, dead_L)
        padded = sparse(crosscoder, x_BMD, 32, dead_L, candidate_Z=torch.arange(30), fixed_size=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(expected.gradients, found.gradients, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(expected.gradients, padded.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_without_the_bias_another_rank_adds_it():
    """What a rank that is not the first of its group leaves out, and that accumulation keeps what was there."""
    crosscoder, x_BMD = small()
    x_BW, operands = x_BMD.flatten(1), Operands.of(crosscoder)
    selection, code_S = evaluation_codes(crosscoder, x_BW, operands)
    codes = Codes(selection, code_S, selection.latent[:0], x_BW.new_empty(16, 0))
    into = Gradients.like(*crosscoder.parameters())
    whole_BW, _ = reconstruct(crosscoder, x_BW, codes, operands, into)
    whole_BW.sum().backward()
    assert torch.equal(into.b_dec, torch.full((12,), 16.0, dtype=torch.float64))
    part_BW, _ = reconstruct(crosscoder, x_BW, codes, operands, into._replace(accumulate=True), with_bias=False)
    torch.testing.assert_close(part_BW + crosscoder.b_dec, whole_BW, rtol=1e-12, atol=1e-12)
    part_BW.sum().backward()
    assert torch.equal(into.b_dec, torch.full((12,), 16.0, dtype=torch.float64))
    part_BW, _ = reconstruct(crosscoder, x_BW, codes, operands, into, with_bias=False)
    part_BW.sum().backward()
    assert into.b_dec.count_nonzero() == 0


@pytest.mark.parametrize("loss", ["norm", "squared"])
def test_bf16_products_change_gradients_by_rounding_alone(loss):
    """Operands of 8 bits change a gradient's direction by little, and no result is narrower than fp32."""
    generator = torch.Generator().manual_seed(0)
    config = CrosscoderConfig(num_latents=60, k=4, loss=loss)
    crosscoder = crosscoder_of(generator, 2, 16, config, torch.float32)
    x_BMD = torch.randn(64, 2, 16, generator=generator)
    none_dead = torch.zeros(60, dtype=torch.bool)
    narrow = partial(sparse, operands=Copies(crosscoder, torch.bfloat16).operands)
    exact = readable(crosscoder, x_BMD, 256, none_dead)
    for form in (narrow, partial(readable, precision=torch.bfloat16)):
        found = form(crosscoder, x_BMD, 256, none_dead)
        assert found.selected.score_S.dtype == torch.float32
        assert found.losses[0] == pytest.approx(exact.losses[0], rel=0.01)
        assert found.losses[0] != exact.losses[0]
        for ours, theirs in zip(exact.gradients, found.gradients, strict=True):
            assert theirs.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


def test_master_weights_in_half_precision_are_refused():
    crosscoder, x_BMD = small()
    with pytest.raises(BadInput, match="float32 or float64 .* on cpu or cuda, and these are torch.bfloat16 on cpu"):
        sparse(crosscoder.bfloat16(), x_BMD.bfloat16(), 32, torch.zeros(30, dtype=torch.bool))


def test_dedicated_rows_get_no_gradient():
    crosscoder, x_BMD = small(dedicated=0.2, auxk_alpha=0.5)
    dead_L = torch.arange(30) % 3 == 0
    W_enc, _, W_dec, _ = sparse(crosscoder, x_BMD, 32, dead_L).gradients
    for gradient in (W_enc, W_dec):
        assert gradient.view(30, 2, 6)[:6, 1].count_nonzero() == 0
        assert gradient.view(30, 2, 6)[6:12, 0].count_nonzero() == 0
        assert gradient.view(30, 2, 6)[:6, 0].count_nonzero() > 0
