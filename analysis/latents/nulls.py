"""What nu is where it should be near 0, and where it should be near 1: what thresholds on it can tell apart.

    random_direction    the other model is asked for a random direction r_j of the norm of d_j: how large |nu| gets by
                        chance, with the same activations, when the other model has nothing to do with the latent:
                        nu = beta_other(r_j) / beta_focus(d_j)
    shared              latents that Delta-norm calls shared, with their own directions: how often a latent of both
                        models passes for one of a single model

Shapes: N latents of a null, n of them with both nu, Q quantiles, M models, D width, L latents; u rows of a batch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from analysis.config import OwnerConfig
from analysis.firings.config import NullsConfig
from analysis.latents.scaling import focus_of, products, ratio_to

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEASURES = ("nu_error", "nu_reconstruction")


class RandomDirections:
    """The sums of latent scaling along random unit directions r_j: sums (N, 2, M), [j, error and recons, m], float64.

    `latent_N` are the latents, drawn among all.
    """

    def __init__(self, num_latents: int, num_models: int, d_model: int, config: NullsConfig, device: torch.device):
        generator = np.random.default_rng(config.seed)
        drawn = np.sort(generator.permutation(num_latents)[: config.num_latents])
        self.latent_N = torch.from_numpy(drawn).to(device)
        random_ND = torch.from_numpy(generator.standard_normal((len(drawn), d_model), dtype=np.float32))
        self.unit_ND = torch.nn.functional.normalize(random_ND, dim=1).to(device)
        self.sums = torch.zeros(len(drawn), 2, num_models, dtype=torch.float64, device=device)
        self._place_L = torch.full((num_latents,), -1, dtype=torch.int64, device=device)
        self._place_L[self.latent_N] = torch.arange(len(drawn), device=device)

    def add(self, latent_u: Tensor, target: int, sums_uMD: Tensor) -> None:
        """Adds the sums of rows; see `scaling.Watch`."""
        place_u = self._place_L[latent_u]
        chosen = (place_u >= 0).nonzero().squeeze(1)
        place_v = place_u[chosen]
        units_vD1 = self.unit_ND[place_v].to(sums_uMD.dtype)[:, :, None]
        dots_vM = torch.bmm(sums_uMD[chosen], units_vD1)[:, :, 0]
        self.sums[:, target].index_add_(0, place_v, dots_vM.double())

    def nu(self, total_LK: Tensor, W_dec_LMD: Tensor, gram_LMM: Tensor) -> tuple[Tensor, Tensor]:
        """nu_error and nu_reconstruction (N, M, M), [j, focus, other], NaN as by `scaling.nu`.

        With r = ||d_j^focus|| r_j, beta_other(r) = <r, sum_t f_j y_other> / (||d_j^focus||^2 sum_t f_j^2), where the
        error target adds back f_j d_j^other as for the latent's own direction.
        """
        latent_N = self.latent_N.cpu()
        gram_NMM, total_NK = gram_LMM[latent_N], total_LK[latent_N]
        norm_NM1 = gram_NMM.diagonal(dim1=1, dim2=2).sqrt()[..., None]
        error_N1M, recons_N1M = self.sums.cpu()[:, :, None].unbind(1)
        rows_NMD, unit_ND = W_dec_LMD[self.latent_N].double().cpu(), self.unit_ND.double().cpu()
        own_N1M = torch.einsum("nmd,nd->nm", rows_NMD, unit_ND)[:, None] * total_NK[:, :1, None]
        focus_error, focus_recons = (focus_of(product) for product in products(total_NK, gram_NMM))
        random_error, random_recons = norm_NM1 * (error_N1M + own_N1M), norm_NM1 * recons_N1M
        return ratio_to(focus_error, random_error), ratio_to(focus_recons, random_recons)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums.cpu().numpy()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on after `arrays` of the same stream."""
        self.sums.copy_(torch.from_numpy(arrays["sums"]))


@dataclass(frozen=True)
class Null:
    """One null: its name and nu_error, nu_reconstruction (N, M, M) of its latents."""

    name: str
    values: tuple[np.ndarray, np.ndarray]


def null_rows(nulls: list[Null], models: list[str], owner: OwnerConfig) -> list[list[object]]:
    """Lines of `nulls.csv` for every ordered pair of models: quantiles of nu, and shares of |nu| below the thresholds
    of ordinary and of dedicated latents.
    """
    rules = [
        (owner.max_nu_error, limit) for limit in (owner.max_nu_reconstruction, owner.max_nu_reconstruction_dedicated)
    ]
    rows: list[list[object]] = []
    for null in nulls:
        for (a, focus), (b, other) in permutations(enumerate(models), 2):
            nu_2N = np.stack([values[:, a, b] for values in null.values])
            nu_2n = nu_2N[:, ~np.isnan(nu_2N).any(axis=0)]
            count = nu_2n.shape[1]
            quantiles_2Q = np.quantile(nu_2n, QUANTILES, axis=1).T if count else np.full((2, len(QUANTILES)), np.nan)
            for row, (measure, quantiles_Q) in enumerate(zip(MEASURES, quantiles_2Q, strict=True)):
                cells = [*quantiles_Q, *(cell for limits in rules for cell in passing(nu_2n, row, limits))]
                rows.append([null.name, measure, focus, other, count, *map(_cell, cells)])
    return rows


def passing(nu_2n: np.ndarray, row: int, limits: tuple[float, float]) -> tuple[float, float, float]:
    """The limit of one measure, the share of latents whose |nu| is below it, and of those with both below theirs."""
    if not nu_2n.size:
        return limits[row], np.nan, np.nan
    passes_2n = np.abs(nu_2n) < np.array(limits)[:, None]
    return limits[row], float(passes_2n[row].mean()), float(passes_2n.all(axis=0).mean())


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def nulls_csv(rows: list[list[object]]) -> str:
    """`nulls.csv` with its heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quantiles = [f"q{round(100 * share):02d}" for share in QUANTILES]
    ends = ["threshold", "share_passing", "share_passing_both"]
    dedicated = [f"{name}_dedicated" for name in ends]
    writer.writerow(["null", "measure", "focus", "other", "count", *quantiles, *ends, *dedicated])
    writer.writerows(rows)
    return text.getvalue()
