"""nu along random directions, against its definition, and on planted latents."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch

from analysis.config import OwnerConfig
from analysis.firings.config import NullsConfig
from analysis.firings.firings import Codes
from analysis.latents.nulls import Null, RandomDirections, null_rows, nulls_csv
from analysis.latents.scaling import ScalingSums, decoder_gram
from tests.analysis.latents.test_scaling import planted, regression

D = 6


def gathered(case, chunk: int, num_latents: int = 5) -> tuple[ScalingSums, RandomDirections]:
    acts_BL, W_dec_LMD, b_dec_MD, x_BMD = case
    sums = ScalingSums(acts_BL.shape[1], W_dec_LMD.shape[1])
    directions = RandomDirections(
        acts_BL.shape[1], W_dec_LMD.shape[1], D, NullsConfig(num_latents), torch.device("cpu")
    )
    for acts_bL, x_bMD in zip(acts_BL.split(chunk), x_BMD.split(chunk), strict=True):
        recons_bMD = torch.einsum("bl,lmd->bmd", acts_bL, W_dec_LMD) + b_dec_MD
        sums.add(Codes.from_dense(acts_bL), x_bMD - recons_bMD, recons_bMD, W_dec_LMD, directions.add)
    return sums, directions


@pytest.mark.parametrize("num_models", [2, 3])
def test_a_random_direction_of_the_same_norm_takes_the_place_of_the_latents_own(num_models: int) -> None:
    case = acts_BL, W_dec_LMD, b_dec_MD, x_BMD = planted(num_models)
    sums, directions = gathered(case, chunk=7)
    nu_error, nu_recons = directions.nu(sums.total(), W_dec_LMD, decoder_gram(W_dec_LMD))
    recons_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD) + b_dec_MD
    assert len(directions.latent_N) == 5
    for place, j in enumerate(directions.latent_N.tolist()):
        f_B, own_BMD = acts_BL[:, j], torch.einsum("b,md->bmd", acts_BL[:, j], W_dec_LMD[j])
        for focus in range(num_models):
            d_D = W_dec_LMD[j, focus]
            random_D = directions.unit_ND[place].double() * d_D.norm()
            for found, target_BMD in ((nu_error, x_BMD - recons_BMD + own_BMD), (nu_recons, recons_BMD)):
                own = regression(f_B, d_D, target_BMD[:, focus])
                for other in range(num_models):
                    expected = regression(f_B, random_D, target_BMD[:, other]) / own
                    assert found[place, focus, other].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_random_directions_pass_and_shared_latents_do_not() -> None:
    """40 latents, of which 20 are shared and 20 the second model's, in 64 dimensions, with noise."""
    generator = torch.Generator().manual_seed(0)
    W_dec_LMD = torch.nn.functional.normalize(torch.randn(40, 1, 64, generator=generator), dim=2).repeat(1, 2, 1)
    W_dec_LMD[20:, 0] = 0
    acts_BL = torch.relu(torch.randn(3000, 40, generator=generator) - 1.5)
    x_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD)
    noise_BMD = 0.05 * torch.randn(x_BMD.shape, generator=generator)
    directions = RandomDirections(40, 2, 64, NullsConfig(), torch.device("cpu"))
    sums = ScalingSums(40, 2)
    sums.add(Codes.from_dense(acts_BL), noise_BMD, x_BMD, W_dec_LMD, directions.add)
    gram = decoder_gram(W_dec_LMD)
    nu_error, nu_recons = (value[:, 1, 0] for value in directions.nu(sums.total(), W_dec_LMD, gram))
    passes = (nu_error.abs() < 0.2) & (nu_recons.abs() < 0.5)
    assert len(passes) == 40 and passes.double().mean() > 0.85
    assert nu_error.std() > 0.01


def test_rows_are_quantiles_and_shares() -> None:
    values = np.full((2, 5, 2, 2), np.nan)
    values[0, :, 1, 0] = [0.0, 0.1, 0.2, 0.3, np.nan]
    values[1, :, 1, 0] = [0.0, -0.6, 0.1, 0.2, 0.3]
    rows = null_rows([Null("shared", (values[0], values[1]))], ["pt", "it"], OwnerConfig())
    table = list(csv.DictReader(io.StringIO(nulls_csv(rows))))
    assert [(row["measure"], row["focus"], row["other"], row["count"]) for row in table] == [
        ("nu_error", "pt", "it", "0"),
        ("nu_reconstruction", "pt", "it", "0"),
        ("nu_error", "it", "pt", "4"),  # what lacks either nu counts in neither
        ("nu_reconstruction", "it", "pt", "4"),
    ]
    assert table[0]["q50"] == table[0]["share_passing"] == ""
    error, recons = table[2:]
    assert float(error["q50"]) == pytest.approx(0.15) and float(recons["q05"]) == pytest.approx(-0.51)
    # Below 0.2: 0, 0.1; below 0.5 in size: all but -0.6; both: the first alone.
    assert (float(error["share_passing"]), float(recons["share_passing"])) == (0.5, 0.75)
    assert float(error["share_passing_both"]) == float(recons["share_passing_both"]) == 0.25
    assert (error["threshold"], recons["threshold"]) == ("0.2", "0.5")
    # For dedicated latents, 0.75 in size: all four, and 0, 0.1 of them with a small nu_error.
    assert (error["threshold_dedicated"], recons["threshold_dedicated"]) == ("0.2", "0.75")
    assert (float(error["share_passing_dedicated"]), float(recons["share_passing_dedicated"])) == (0.5, 1)
    assert float(error["share_passing_both_dedicated"]) == float(recons["share_passing_both_dedicated"]) == 0.5


def test_directions_go_on_from_their_arrays() -> None:
    case = planted(2)
    _, directions = gathered(case, chunk=50)
    again = RandomDirections(7, 2, D, NullsConfig(5), torch.device("cpu"))
    again.restore(directions.arrays())
    assert torch.equal(again.sums, directions.sums) and torch.equal(again.unit_ND, directions.unit_ND)
