"""Latent scaling against regressions over an explicit (tokens x width) design, and the owners on planted latents."""

import numpy as np
import pytest
import torch

from analysis.firings.firings import Codes
from analysis.latents.scaling import CHUNK_VALUES, TILE_VALUES, ScalingSums, decoder_gram, nu
from tests.analysis.random_study import DEVICES

D = 6


def planted(num_models: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (B, L), W_dec (L, M, D), b_dec (M, D), x (B, M, D)) with noise, so that no regression is trivial."""
    generator = torch.Generator().manual_seed(seed)
    acts_BL = torch.relu(torch.randn(50, 7, generator=generator, dtype=torch.float64) - 0.5)
    W_dec_LMD = torch.randn(7, num_models, D, generator=generator, dtype=torch.float64)
    b_dec_MD = torch.randn(num_models, D, generator=generator, dtype=torch.float64)
    noise_BMD = torch.randn(50, num_models, D, generator=generator, dtype=torch.float64)
    return acts_BL, W_dec_LMD, b_dec_MD, torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD) + noise_BMD


def gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD, chunk: int = 50, num_groups: int = 1) -> ScalingSums:
    """The sums of a stream in chunks; token t is of group t mod num_groups."""
    sums = ScalingSums(acts_BL.shape[1], W_dec_LMD.shape[1], num_groups, acts_BL.device)
    group_B = torch.arange(len(acts_BL), device=acts_BL.device) % num_groups
    for acts_bL, x_bMD, group_b in zip(*(whole.split(chunk) for whole in (acts_BL, x_BMD, group_B)), strict=True):
        recons_bMD = torch.einsum("bl,lmd->bmd", acts_bL, W_dec_LMD) + b_dec_MD
        sums.add(Codes.from_dense(acts_bL, group_b), x_bMD - recons_bMD, recons_bMD, W_dec_LMD)
    return sums


def regression(f_B: torch.Tensor, d_D: torch.Tensor, y_BD: torch.Tensor) -> float:
    """The beta that minimises sum_t ||y_t - beta f_t d||^2, over every entry of the (B * D, 1) design."""
    design = torch.outer(f_B, d_D).reshape(-1, 1).numpy()
    return float(np.linalg.lstsq(design, y_BD.reshape(-1).numpy(), rcond=None)[0][0])


def nu_by_regression(acts_BL, W_dec_LMD, b_dec_MD, x_BMD, j: int, focus: int, other: int) -> tuple[float, float]:
    recons_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD) + b_dec_MD
    without_j = acts_BL.clone()
    without_j[:, j] = 0
    # The error target by its meaning: what is left of x when every latent but j (and the bias) is taken away.
    rest_BMD = x_BMD - torch.einsum("bl,lmd->bmd", without_j, W_dec_LMD) - b_dec_MD
    f_B, d_D = acts_BL[:, j], W_dec_LMD[j, focus]
    betas = [(regression(f_B, d_D, y[:, other]), regression(f_B, d_D, y[:, focus])) for y in (rest_BMD, recons_BMD)]
    return tuple(beta_other / beta_focus for beta_other, beta_focus in betas)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_models", [2, 3])
def test_nu_equals_the_regressions(num_models: int, device: str) -> None:
    case = planted(num_models)
    there = [tensor.to(device) for tensor in case]
    nu_error, nu_reconstruction = nu(gather(*there).total(), decoder_gram(there[1]))
    for j in range(7):
        for focus in range(num_models):
            for other in range(num_models):
                expected = nu_by_regression(*case, j, focus, other)
                assert nu_error[j, focus, other].item() == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
                assert nu_reconstruction[j, focus, other].item() == pytest.approx(expected[1], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_streaming_in_chunks_equals_one_batch(chunk: int) -> None:
    whole, streamed = gather(*planted(2)), gather(*planted(2), chunk=chunk)
    torch.testing.assert_close(streamed.total(), whole.total(), rtol=1e-12, atol=1e-12)


def test_small_temporaries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(3)
    whole = gather(*case, num_groups=3)
    monkeypatch.setitem(CHUNK_VALUES, "cpu", 40)
    torch.testing.assert_close(gather(*case, num_groups=3).sums_RK, whole.sums_RK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoder_gram(case[1]), torch.einsum("jad,jmd->jam", case[1], case[1]))


def test_sums_by_hand() -> None:
    acts_BL = torch.tensor([[2.0, 0, 0], [0, 3, 0], [4, 0, 0]], dtype=torch.float64)
    sums = ScalingSums(3, 1)
    W_dec_LMD = torch.tensor([[[1.0, 0]], [[0, 1]], [[1, 1]]], dtype=torch.float64)
    x_BMD = torch.tensor([[[2.5, 9]], [[7, 3]], [[4, 9]]], dtype=torch.float64)
    recons_BMD = torch.tensor([[[2.0, 0]], [[0, 3]], [[4, 0]]], dtype=torch.float64)
    sums.add(Codes.from_dense(acts_BL), x_BMD - recons_BMD, recons_BMD, W_dec_LMD)
    sum_f2, error, recons = sums.total().T.tolist()
    assert sum_f2 == [20, 9, 0]
    # Latent 0: 2 * (2.5 - 2) + 4 * (4 - 4) = 1 of the error and 2 * 2 + 4 * 4 = 20 of the reconstruction.
    assert error == [1, 0, 0]
    assert recons == [20, 9, 0]


def orthogonal_case(decoder: dict[int, tuple[float, ...]], x_gain: dict[int, tuple[float, ...]]):
    """Latents along the axes that fire one at a time, with decoder norms and true gains given by model, base first."""
    num_models = len(decoder[0])
    acts_BL = 2.0 * torch.eye(D, dtype=torch.float64)
    W_dec_LMD, x_BMD = (torch.zeros(D, num_models, D, dtype=torch.float64) for _ in range(2))
    for j, norms in decoder.items():
        for m in range(num_models):
            W_dec_LMD[j, m, j] = norms[m]
            x_BMD[j, m, j] = 2.0 * x_gain.get(j, norms)[m]
    return acts_BL, W_dec_LMD, torch.zeros(num_models, D, dtype=torch.float64), x_BMD


def test_nan_rules() -> None:
    """Never fired: all NaN. A zero row: NaN as focus, 0 as the other. beta_focus = 0: NaN. None of them is owned."""
    acts_BL, W_dec_LMD, b_dec_MD, x_BMD = orthogonal_case({0: (1, 1), 1: (0, 1), 2: (1, 1)}, {2: (0, 1)})
    acts_BL[0] = 0
    nu_error, nu_reconstruction = nu(gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD).total(), decoder_gram(W_dec_LMD))
    assert nu_error[0].isnan().all() and nu_reconstruction[0].isnan().all()
    assert nu_error[1, 0].isnan().all() and nu_error[1, 1, 0] == 0
    # The base never uses latent 2: recons holds 2 e_2, x nothing, so beta_error of the base is -1 + 1 = 0.
    assert nu_error[2, 0].isnan().all() and nu_error[2, 1, 0] == 0


@pytest.mark.parametrize("chunk", [7, 50])
def test_groups_hold_the_sums_of_their_tokens(chunk: int) -> None:
    """Of each group what a stream of its tokens alone gives; together, all."""
    acts_BL, W_dec_LMD, b_dec_MD, x_BMD = planted(2)
    grouped = gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD, chunk, num_groups=3)
    sums_GLK = grouped.sums_RK.unflatten(0, (3, -1))
    for group in range(3):
        alone = gather(acts_BL[group::3], W_dec_LMD, b_dec_MD, x_BMD[group::3])
        torch.testing.assert_close(sums_GLK[group], alone.total(), rtol=1e-12, atol=1e-12)
    whole = gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD)
    torch.testing.assert_close(grouped.total(), whole.total(), rtol=1e-12, atol=1e-12)


def test_sums_go_on_from_their_arrays() -> None:
    case = planted(2)
    sums = gather(*case, num_groups=2)
    again = ScalingSums(7, 2, 2)
    again.restore(sums.arrays())
    assert torch.equal(again.sums_RK, sums.sums_RK)


def test_a_batch_in_which_nothing_fires() -> None:
    sums = ScalingSums(4, 2)
    sums.add(Codes.from_dense(torch.zeros(3, 4)), torch.randn(3, 2, D), torch.zeros(3, 2, D), torch.randn(4, 2, D))
    assert not sums.sums_RK.any()


def test_columns_in_parts_and_rows_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = Codes.from_dense((torch.rand(40, 30, generator=generator) - 0.5).relu())
    error_BMD, recons_BMD, W_dec_LMD = (torch.randn(n, 2, 24, generator=generator) for n in (40, 40, 30))
    found = []
    for values in (2**20, 96):  # all at once, and three parts of 16 columns for two rows at a time
        for limits in (CHUNK_VALUES, TILE_VALUES):
            monkeypatch.setitem(limits, "cpu", values)
        sums = ScalingSums(30, 2)
        sums.add(codes, error_BMD, recons_BMD, W_dec_LMD)
        found.append(sums.sums_RK)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
